// Words: the operands of attention's products, and the lanes they move through. Included by csrc/cpu/attention_*.h.
#pragma once
#include <type_traits>
#include <utility>

#include "vec.h"

namespace onepass::ONEPASS_ISA {
namespace {

#if defined(__AVX512BF16__)
inline constexpr bool HAS_DOT = true;
#else
inline constexpr bool HAS_DOT = false;
#endif

#if defined(__AVX512F__)
inline constexpr bool HAS_WHOLE = true;
#else
inline constexpr bool HAS_WHOLE = false;
#endif

// What a word of a few rows' products is: a float, a pair of bfloat16, or a pair of 16-bit whole numbers.
enum class Way { floats, pairs, whole };

// How few rows of Q take a cache of T: int8 as it is, with queries and weights as whole numbers, where Q is bfloat16:
// the 16 bits of the largest are too few for float16's smaller ones.
template <class Q, class T, bool DOT>
inline constexpr Way WAY_OF = HAS_WHOLE && std::is_same_v<T, I8> && std::is_same_v<Q, BF16> ? Way::whole
                              : DOT                                                         ? Way::pairs
                                                                                            : Way::floats;

template <Way WAY>
using Sum = std::conditional_t<WAY == Way::whole, I32, F32>;

// acc + a b, with b W words and a one word for all of them. A word is a float, or with DOT a pair of bfloat16 that
// vdpbf16ps multiplies and adds in float32.
template <bool DOT>
OP_INLINE F32 multiply_add(const float* a, F32 b, F32 acc) {
#if defined(__AVX512BF16__)
  if constexpr (DOT) {
    int32_t pair;
    std::memcpy(&pair, a, sizeof pair);
    return _mm512_dpbf16_ps(acc, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)b);
  }
#endif
  return fma(splat(*a), b, acc);
}

template <bool DOT>
OP_INLINE F32 multiply_add(F32 a, F32 b, F32 acc) {
#if defined(__AVX512BF16__)
  if constexpr (DOT) return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b);
#endif
  return fma(a, b, acc);
}

#if defined(__AVX512F__)
OP_INLINE I32 dot_whole(F32 a, F32 b, I32 acc) {
#if defined(__AVX512VNNI__)
  return (I32)_mm512_dpwssd_epi32((__m512i)acc, (__m512i)a, (__m512i)b);
#else
  return acc + (I32)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#endif
}
#endif

// The same of whole numbers, whose sums are exact, or of what a word else is.
template <Way WAY>
OP_INLINE Sum<WAY> accumulate(F32 a, F32 b, Sum<WAY> acc) {
#if defined(__AVX512F__)
  if constexpr (WAY == Way::whole) return dot_whole(a, b, acc);
#endif
  if constexpr (WAY != Way::whole) return multiply_add<WAY == Way::pairs>(a, b, acc);
}
template <Way WAY>
OP_INLINE Sum<WAY> accumulate(const float* a, F32 b, Sum<WAY> acc) {
  if constexpr (WAY == Way::whole) {
    uint32_t pair;
    std::memcpy(&pair, a, sizeof pair);
    return accumulate<WAY>((F32)splat_u32(pair), b, acc);
  } else {
    return multiply_add<WAY == Way::pairs>(a, b, acc);
  }
}

// Weights from `at` on as the first factor of a product.
template <bool DOT>
OP_INLINE void store_weights(float* to, int at, F32 x) {
#if defined(__AVX512BF16__)
  if constexpr (DOT) {  // the product takes denormals for zeros, so that the conversion may
    const __m256bh half = _mm512_cvtneps_pbh(x);
    std::memcpy(reinterpret_cast<BF16*>(to) + at, &half, sizeof half);
    return;
  }
#endif
  store(to + at, x);
}

#if defined(__AVX512F__)
// W times `vectors` numbers as multiples of the result: whole numbers of 16 bits, those of two vectors at every 2 W
// `apart`. The unit is a power of two, so that a query of bfloat16 loses nothing where its numbers differ by less than
// 2^7. NaN where one of them is no finite number.
OP_INLINE float store_whole(const F32* x, int64_t vectors, int16_t* to, int64_t apart) {
  constexpr int32_t EXPONENT = 0x7F800000;
  __m512i largest = _mm512_setzero_si512();  // as bits, of which those of Inf and NaN are above all numbers'
  for (int64_t n = 0; n < vectors; ++n)
    largest = _mm512_max_epi32(largest, _mm512_and_si512((__m512i)x[n], _mm512_set1_epi32(INT32_MAX)));
  const int32_t power = _mm512_reduce_max_epi32(largest) & EXPONENT;
  float unit;
  std::memcpy(&unit, &power, sizeof unit);
  unit *= 0x1p-14f;
  const F32 factor = splat(power < EXPONENT && unit >= __FLT_MIN__ ? 1.0f / unit : 0.0f);
  for (int64_t n = 0; n < vectors; ++n)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + n / 2 * 2 * W * apart + n % 2 * W),
                        _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32((__m512)(x[n] * factor))));
  return power < EXPONENT ? unit : __builtin_nanf("");
}
#endif

// ---- lanes ----

template <int S, int... J>
OP_INLINE F32 lower(F32 a, F32 b, std::integer_sequence<int, J...>) {
  return shuffle<((J & S) ? W + J - S : J)...>(a, b);
}
template <int S, int... J>
OP_INLINE F32 upper(F32 a, F32 b, std::integer_sequence<int, J...>) {
  return shuffle<((J & S) ? W + J : J + S)...>(a, b);
}
using Lanes = std::make_integer_sequence<int, W>;

template <int S>
OP_INLINE void transpose_step(F32 (&x)[W]) {
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i)
    if (!(i & S)) {
      const F32 a = x[i], b = x[i + S];
      x[i] = lower<S>(a, b, Lanes{});
      x[i + S] = upper<S>(a, b, Lanes{});
    }
}

OP_INLINE void transpose(F32 (&x)[W]) {
  if constexpr (W >= 16) transpose_step<8 % W>(x);
  if constexpr (W >= 8) transpose_step<4 % W>(x);
  transpose_step<2>(x);
  transpose_step<1>(x);
}

// Lanes without S of the result are sums of two of a, those with it of b: a blend and one shuffle.
template <int S, class V, int... J>
OP_INLINE V fold(V a, V b, std::integer_sequence<int, J...>) {
  const V stay = (V)shuffle<((J & S) ? W + J : J)...>((F32)a, (F32)b);
  return stay + (V)shuffle<((J & S) ? W + J - S : J + S)...>((F32)a, (F32)b);
}

template <int S, class V>
OP_INLINE void sum_step(V (&x)[W]) {
#pragma GCC unroll 16
  for (int i = 0; i < S; ++i) x[i] = fold<S>(x[i], x[i + S], Lanes{});
}

// Lane i of the result is the sum of the lanes of x[i].
template <class V>
OP_INLINE V sums(V (&x)[W]) {
  if constexpr (W >= 16) sum_step<8 % W>(x);
  if constexpr (W >= 8) sum_step<4 % W>(x);
  sum_step<2>(x);
  sum_step<1>(x);
  return x[0];
}

// x[g] has R blocks of W / R lanes, block r of it becomes block g of x[r].
template <int R>
OP_INLINE void turn_blocks(F32 (&x)[R]) {
  const auto step = [&](auto half) {
    constexpr int HALF = decltype(half)::value, S = HALF * W / R;
    for (int g = 0; g < R; ++g)
      if (!(g & HALF)) {
        const F32 a = x[g], b = x[g + HALF];
        x[g] = lower<S>(a, b, Lanes{});
        x[g + HALF] = upper<S>(a, b, Lanes{});
      }
  };
  if constexpr (R >= 4) step(std::integral_constant<int, 2>{});
  if constexpr (R >= 2) step(std::integral_constant<int, 1>{});
}

// ---- reading words of a row of `dim` elements ----

template <class T>
inline constexpr bool IS_CODE = std::is_same_v<T, I8> || std::is_same_v<T, E4M3>;

template <class T, bool DOT>
inline constexpr int PER_WORD = DOT ? 2 : 1;

#if defined(__AVX512BF16__)
// 32 codes as the bfloat16 that they are, each exactly.
OP_INLINE F32 widen_pairs(const I8* codes) {
  const __m512i odd = _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27, 25,
                                       23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
  return (F32)_mm512_permutex2var_epi16((__m512i)load(codes), odd, (__m512i)load(codes + W));
}

OP_INLINE F32 widen_pairs(const E4M3* codes) {
  // m 2^-9, where the exponent is zero.
  const __m512i denormal =
      _mm512_castsi128_si512(_mm_set_epi16(0x3C60, 0x3C40, 0x3C20, 0x3C00, 0x3BC0, 0x3B80, 0x3B00, 0));
  const __m512i wide = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
  const __m512i size = _mm512_and_si512(wide, _mm512_set1_epi16(0x7F));
  __m512i x = _mm512_add_epi16(_mm512_slli_epi16(size, 4), _mm512_set1_epi16(120 << 7));
  x = _mm512_mask_permutexvar_epi16(x, _mm512_cmplt_epu16_mask(size, _mm512_set1_epi16(8)), size, denormal);
  x = _mm512_mask_mov_epi16(x, _mm512_cmpeq_epi16_mask(size, _mm512_set1_epi16(0x7F)), _mm512_set1_epi16(0x7FC0));
  return (F32)_mm512_or_si512(x, _mm512_and_si512(wide, _mm512_set1_epi16(-0x8000)));
}
#endif

#if defined(__AVX512F__)
// 32 codes as whole numbers of 16 bits.
OP_INLINE F32 widen_whole(__m256i codes) { return (F32)_mm512_cvtepi8_epi16(codes); }
#endif

template <class T, bool DOT>
OP_INLINE F32 all_words(const T* at) {
#if defined(__AVX512BF16__)
  if constexpr (DOT && IS_CODE<T>)
    return widen_pairs(at);
  else if constexpr (DOT)
    return (F32)_mm512_loadu_si512(at);
#endif
  return load(at);
}

// W words from element `at`, zeros beyond `dim`.
template <class T, bool DOT>
OP_INLINE F32 words(const T* row, int64_t at, int64_t dim) {
  constexpr int N = W * PER_WORD<T, DOT>;
  const int left = static_cast<int>(dim - at);
#if defined(__AVX512BF16__)
  if constexpr (DOT && IS_CODE<T>) {
    if (left >= N) return widen_pairs(row + at);
    T some[N] = {};
    std::memcpy(some, row + at, left);
    return widen_pairs(some);
  } else if constexpr (DOT) {
    if (left >= N) return (F32)_mm512_loadu_si512(row + at);
    return (F32)_mm512_maskz_loadu_epi16(static_cast<__mmask32>((1u << left) - 1), row + at);
  }
#endif
  return left >= N ? load(row + at) : load_n(row + at, left);
}

template <class T, Way WAY>
OP_INLINE F32 all_words_of(const T* at) {
#if defined(__AVX512F__)
  if constexpr (WAY == Way::whole) return widen_whole(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
#endif
  if constexpr (WAY != Way::whole) return all_words<T, WAY == Way::pairs>(at);
}

template <class T, Way WAY>
OP_INLINE F32 words_of(const T* row, int64_t at, int64_t dim) {
#if defined(__AVX512F__)
  if constexpr (WAY == Way::whole) {
    const uint32_t lanes = dim - at >= 2 * W ? ~0u : (1u << (dim - at)) - 1;
    return widen_whole(_mm256_maskz_loadu_epi8(lanes, row + at));
  }
#endif
  if constexpr (WAY != Way::whole) return words<T, WAY == Way::pairs>(row, at, dim);
}

// Sums are short chains, or error grows with their length: CHAIN words are added in a row, and a lone column of
// vectors, which has registers to spare, is summed in WAYS interleaved parts. Half of CHAIN took 1.03 times as long,
// for an RMS error in float32 of 0.4 to 0.8 of PyTorch's in place of 0.4 to 1.0.
inline constexpr int64_t CHAIN = 64;
template <bool DOT, int N>
inline constexpr int WAYS = !DOT && N == 1 ? 4 : 1;

template <int WAYS>
OP_INLINE F32 total(const F32 (&part)[WAYS]) {
  if constexpr (WAYS == 4)
    return (part[0] + part[1]) + (part[2] + part[3]);
  else
    return part[0];
}

}  // namespace
}  // namespace onepass::ONEPASS_ISA
