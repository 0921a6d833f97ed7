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

// ---- lanes ----

template <int S, int... J>
OP_INLINE F32 lower(F32 a, F32 b, std::integer_sequence<int, J...>) {
  return __builtin_shufflevector(a, b, ((J & S) ? W + J - S : J)...);
}
template <int S, int... J>
OP_INLINE F32 upper(F32 a, F32 b, std::integer_sequence<int, J...>) {
  return __builtin_shufflevector(a, b, ((J & S) ? W + J : J + S)...);
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

template <int S>
OP_INLINE void sum_step(F32 (&x)[W]) {
#pragma GCC unroll 16
  for (int i = 0; i < S; ++i) x[i] = lower<S>(x[i], x[i + S], Lanes{}) + upper<S>(x[i], x[i + S], Lanes{});
}

// Lane i of the result is the sum of the lanes of x[i].
OP_INLINE F32 sums(F32 (&x)[W]) {
  if constexpr (W >= 16) sum_step<8 % W>(x);
  if constexpr (W >= 8) sum_step<4 % W>(x);
  sum_step<2>(x);
  sum_step<1>(x);
  return x[0];
}

// ---- reading words of a row of `dim` elements ----

template <class T>
inline constexpr bool IS_CODE = std::is_same_v<T, I8> || std::is_same_v<T, E4M3>;

template <class T, bool DOT>
inline constexpr int PER_WORD = DOT ? 2 : 1;

#if defined(__AVX512BF16__)
// Pairs (low, high) of bfloat16 from floats that it holds exactly.
OP_INLINE F32 pairs(F32 low, F32 high) { return (F32)((U32)low >> 16 | (U32)high); }
#endif

// Two bfloat16 of a word are neighbours in memory; two codes are W apart, which their queries are told by pair_up.
template <class T, bool DOT>
OP_INLINE F32 all_words(const T* at) {
#if defined(__AVX512BF16__)
  if constexpr (DOT && IS_CODE<T>)
    return pairs(load(at), load(at + W));
  else if constexpr (DOT)
    return (F32)_mm512_loadu_si512(at);
#endif
  return load(at);
}

template <class T, bool DOT>
OP_INLINE int64_t word_count(int64_t dim) {
  if constexpr (DOT && IS_CODE<T>) return dim / (2 * W) * W + (dim % (2 * W) < W ? dim % (2 * W) : W);
  return (dim + PER_WORD<T, DOT> - 1) / PER_WORD<T, DOT>;
}

// W words from element `at`, zeros beyond `dim`.
template <class T, bool DOT>
OP_INLINE F32 words(const T* row, int64_t at, int64_t dim) {
  constexpr int N = W * PER_WORD<T, DOT>;
  const int left = static_cast<int>(dim - at);
#if defined(__AVX512BF16__)
  if constexpr (DOT && IS_CODE<T>) {
    return pairs(load_n(row + at, left), left > W ? load_n(row + at + W, left - W) : F32{});
  } else if constexpr (DOT) {
    if (left >= N) return (F32)_mm512_loadu_si512(row + at);
    return (F32)_mm512_maskz_loadu_epi16(static_cast<__mmask32>((1u << left) - 1), row + at);
  }
#endif
  return left >= N ? load(row + at) : load_n(row + at, left);
}

// The words of a query from its channels: x [2 * W * n] floats, of which T's words hold the halves as all_words does.
template <class T>
OP_INLINE void pair_up(const float* x, int64_t channels, float* q) {
  for (int64_t d = 0; d < channels; d += 2 * W) {
    const F32 a = load(x + d), b = load(x + d + W);
    BF16* to = reinterpret_cast<BF16*>(q + d / 2);
    if constexpr (IS_CODE<T>) {
      U32 low = __builtin_convertvector(narrow(a, BF16{}), U32), high = __builtin_convertvector(narrow(b, BF16{}), U32);
      store(q + d / 2, (F32)(low | high << 16));
    } else {
      store(to, a);
      store(to + W, b);
    }
  }
}

// Sums are short chains, or error grows with their length: CHAIN words are added in a row, and a lone column of
// vectors, which has registers to spare, is summed in WAYS interleaved parts.
template <bool DOT>
inline constexpr int64_t CHAIN = DOT ? 32 : 16;
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
