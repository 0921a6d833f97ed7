// The arithmetic of attention's tiles. Operands are 32-bit words: floats, or with DOT pairs of bfloat16 that
// vdpbf16ps multiplies and adds in float32. Included by csrc/cpu/attention.cpp alone.
#pragma once
#include <utility>

#include "vec.h"

namespace onepass::ONEPASS_ISA {
namespace {

#if defined(__AVX512BF16__)
inline constexpr bool HAS_DOT = true;
#else
inline constexpr bool HAS_DOT = false;
#endif

// acc + a b, with b W words and a one word for all of them.
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

template <class T, bool DOT>
inline constexpr int PER_WORD = DOT ? 2 : 1;

// W words from element `at`, zeros beyond `dim`.
template <class T, bool DOT>
OP_INLINE F32 words(const T* row, int64_t at, int64_t dim) {
  constexpr int N = W * PER_WORD<T, DOT>;
  const int left = static_cast<int>(dim - at);
#if defined(__AVX512BF16__)
  if constexpr (DOT) {
    if (left >= N) return (F32)_mm512_loadu_si512(row + at);
    return (F32)_mm512_maskz_loadu_epi16(static_cast<__mmask32>((1u << left) - 1), row + at);
  }
#endif
  return left >= N ? load(row + at) : load_n(row + at, left);
}

// ---- products ----

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

// R rows of c[N vectors] = alpha c + a b: a [R][depth] words, b [depth][N vectors]; alpha null: c is not read.
template <bool DOT, int R, int N>
OP_INLINE void block(const float* a, int64_t a_step, const float* b, int64_t b_step, int64_t depth, const float* alpha,
                     float* c, int64_t c_step) {
  constexpr int PARTS = WAYS<DOT, N>;
  constexpr int64_t STEP = CHAIN<DOT> * PARTS;
  for (int64_t k = 0; k < depth;) {
    const bool first = k == 0;
    const int64_t end = depth - k < STEP ? depth : k + STEP;
    F32 acc[R][N][PARTS] = {};
    const auto add = [&](int64_t k, int part) {
      F32 column[N];
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) column[n] = load(b + k * b_step + n * W);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) acc[r][n][part] = multiply_add<DOT>(a + r * a_step + k, column[n], acc[r][n][part]);
    };
    for (; k + PARTS <= end; k += PARTS)
#pragma GCC unroll 4
      for (int part = 0; part < PARTS; ++part) add(k + part, part);
    for (; k < end; ++k) add(k, 0);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) {
        float* at = c + r * c_step + n * W;
        const F32 sum = total(acc[r][n]);
        if (!first)
          store(at, load(at) + sum);
        else
          store(at, alpha ? fma(load(at), splat(alpha[r]), sum) : sum);
      }
  }
}

// Registers: 24 sums, 4 columns and a word with 32 of them; 12, 2 and 1 with 16.
inline constexpr int ROWS = 6;
inline constexpr int COLUMNS = W == 16 ? 4 : 2;

template <bool DOT, int N>
static void block_of(int rows, const float* a, int64_t a_step, const float* b, int64_t b_step, int64_t depth,
                     const float* alpha, float* c, int64_t c_step) {
  switch (rows) {
    case 6: return block<DOT, 6, N>(a, a_step, b, b_step, depth, alpha, c, c_step);
    case 5: return block<DOT, 5, N>(a, a_step, b, b_step, depth, alpha, c, c_step);
    case 4: return block<DOT, 4, N>(a, a_step, b, b_step, depth, alpha, c, c_step);
    case 3: return block<DOT, 3, N>(a, a_step, b, b_step, depth, alpha, c, c_step);
    case 2: return block<DOT, 2, N>(a, a_step, b, b_step, depth, alpha, c, c_step);
    case 1: return block<DOT, 1, N>(a, a_step, b, b_step, depth, alpha, c, c_step);
  }
}

// Up to ROWS rows of c [vectors] = alpha c + a b.
template <bool DOT>
static void product(int rows, const float* a, int64_t a_step, const float* b, int64_t b_step, int64_t depth,
                    const float* alpha, float* c, int64_t c_step, int64_t vectors) {
  int64_t n = 0;
  for (; n + COLUMNS <= vectors; n += COLUMNS)
    block_of<DOT, COLUMNS>(rows, a, a_step, b + n * W, b_step, depth, alpha, c + n * W, c_step);
  for (; n < vectors; ++n) block_of<DOT, 1>(rows, a, a_step, b + n * W, b_step, depth, alpha, c + n * W, c_step);
}

// ---- packing for many rows ----

// words of `count` key rows, transposed: packed[word][key], `width` keys, zeros beyond count. row(j) points to key j.
template <class T, bool DOT, class Row>
static void pack_keys(Row&& row, int count, int width, int64_t dim, float* packed) {
  constexpr int N = W * PER_WORD<T, DOT>;
  for (int j = 0; j < width; j += W)
    for (int64_t d = 0; d < dim; d += N) {
      F32 x[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) x[i] = j + i < count ? words<T, DOT>(row(j + i), d, dim) : F32{};
      transpose(x);
      float* at = packed + d / PER_WORD<T, DOT> * width + j;
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) store(at + i * width, x[i]);
    }
}

// Values as the second factor: packed[key][channel] floats, or [key / 2][channel] pairs; zeros beyond count and dim.
template <class T, bool DOT, class Row>
static void pack_values(Row&& row, int count, int64_t dim, int64_t step, float* packed) {
#if defined(__AVX512BF16__)
  if constexpr (DOT) {
    const __m512i first = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6,
                                           37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
    for (int j = 0; j < count; j += 2)
      for (int64_t d = 0; d < dim; d += 2 * W) {
        const __m512i a = (__m512i)words<T, true>(row(j), d, dim);
        const __m512i b = j + 1 < count ? (__m512i)words<T, true>(row(j + 1), d, dim) : _mm512_setzero_si512();
        float* at = packed + j / 2 * step + d;
        _mm512_storeu_si512(at, _mm512_permutex2var_epi16(a, first, b));
        _mm512_storeu_si512(at + W, _mm512_permutex2var_epi16(a, second, b));
      }
    return;
  }
#endif
  for (int j = 0; j < count; ++j)
    for (int64_t d = 0; d < dim; d += W) store(packed + j * step + d, words<T, false>(row(j), d, dim));
}

// ---- few rows: keys and values are used as they lie, each read once ----

// scores[r][j] of R rows of q against `count` keys, W of them (row, key) pairs at a time.
template <class T, bool DOT, int R, class Row, class Ahead>
OP_INLINE void dots(const float* q, int64_t q_step, Row&& row, Ahead&& ahead, int count, int64_t dim, float* scores,
                    int64_t scores_step) {
  constexpr int KEYS = W / R, N = W * PER_WORD<T, DOT>;
  for (int j = 0; j < count; j += KEYS) {
    const T* key[KEYS];
#pragma GCC unroll 16
    for (int i = 0; i < KEYS; ++i) key[i] = row(j + i < count ? j + i : count - 1);
    F32 acc[W] = {};
    for (int64_t d = 0; d < dim; d += N) {
      F32 x[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) x[r] = load(q + r * q_step + d / PER_WORD<T, DOT>);
#pragma GCC unroll 16
      for (int i = 0; i < KEYS; ++i) {
        const F32 y = words<T, DOT>(key[i], d, dim);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) acc[r * KEYS + i] = multiply_add<DOT>(x[r], y, acc[r * KEYS + i]);
      }
    }
    float lanes[W];
    store(lanes, sums(acc));
    for (int r = 0; r < R; ++r) std::memcpy(scores + r * scores_step + j, lanes + r * KEYS, KEYS * sizeof(float));
    ahead(j, KEYS);
  }
}

// R rows of c [dim] = alpha c + p v over `count` keys; p holds floats, or with DOT pairs of bfloat16.
template <class T, bool DOT, int R, int N, class Row>
OP_INLINE void weigh_part(const float* p, int64_t p_step, Row&& row, int count, int64_t dim, int64_t at,
                          const float* alpha, float* c, int64_t c_step) {
  constexpr int PARTS = WAYS<DOT, N>, STEP = CHAIN<DOT> * PER_WORD<T, DOT> * PARTS;
  for (int j = 0; j < count;) {
    const bool first = j == 0;
    const int end = count - j < STEP ? count : j + STEP;
    F32 acc[R][N][PARTS] = {};
#if defined(__AVX512BF16__)
    if constexpr (DOT) {
      const __m512i first = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6,
                                             37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
      const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
      for (; j < end; j += 2) {
        const T *even = row(j), *odd = row(j + 1 < count ? j + 1 : j);
        const bool lone = j + 1 >= count;
        F32 pair[N];
#pragma GCC unroll 4
        for (int n = 0; n < N; n += 2) {
          const __m512i a = (__m512i)words<T, true>(even, at + n * W, dim);
          const __m512i b = lone ? _mm512_setzero_si512() : (__m512i)words<T, true>(odd, at + n * W, dim);
          pair[n] = (F32)_mm512_permutex2var_epi16(a, first, b);
          pair[n + 1] = (F32)_mm512_permutex2var_epi16(a, second, b);
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
          for (int n = 0; n < N; ++n) acc[r][n][0] = multiply_add<true>(p + r * p_step + j / 2, pair[n], acc[r][n][0]);
      }
    } else
#endif
    {
      const auto add = [&](int j, int part) {
        const T* value = row(j);
        F32 x[N];
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) x[n] = words<T, false>(value, at + n * W, dim);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
          for (int n = 0; n < N; ++n) acc[r][n][part] = multiply_add<false>(p + r * p_step + j, x[n], acc[r][n][part]);
      };
      for (; j + PARTS <= end; j += PARTS)
#pragma GCC unroll 4
        for (int part = 0; part < PARTS; ++part) add(j + part, part);
      for (; j < end; ++j) add(j, 0);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        float* sum = c + r * c_step + at + n * W;
        const F32 added = total(acc[r][n]);
        store(sum, first ? fma(load(sum), splat(alpha[r]), added) : load(sum) + added);
      }
  }
}

template <class T, bool DOT, int R, class Row>
OP_INLINE void weigh(const float* p, int64_t p_step, Row&& row, int count, int64_t dim, const float* alpha, float* c,
                     int64_t c_step) {
  constexpr int WIDE = W >= 16 ? 4 : 2, NARROW = DOT ? 2 : 1;
  int64_t at = 0;
  for (; at + WIDE * W <= dim; at += WIDE * W)
    weigh_part<T, DOT, R, WIDE>(p, p_step, row, count, dim, at, alpha, c, c_step);
  for (; at < dim; at += NARROW * W) weigh_part<T, DOT, R, NARROW>(p, p_step, row, count, dim, at, alpha, c, c_step);
}

// ---- the exponential of a softmax ----

// e^x for x <= 0 within 2 ulp, exactly 0 from -87.7 down, NaN for NaN.
OP_INLINE F32 exp_negative(F32 x) {
  const F32 bounded = max(splat(-88.0f), x);
  const F32 k = round_even(bounded * 1.44269504f);
  F32 r = fma(k, splat(-0.693359375f), bounded);
  r = fma(k, splat(2.12194440e-4f), r);
  F32 q = splat(1.3818296e-3f);
  q = fma(q, r, splat(8.368532e-3f));
  q = fma(q, r, splat(4.1668292e-2f));
  q = fma(q, r, splat(0.16666523f));
  q = fma(q, r, splat(0.49999994f));
  const F32 y = fma(q, r * r, r) + 1.0f;
  return y * as_f32((truncate(x == x ? k : splat(0.0f)) + 127) << 23);
}

OP_INLINE F32 tanh(F32 x) {
  const F32 size = x < 0.0f ? -x : x;
  const F32 t = expm1(2.0f * min(size, splat(20.0f)));
  const F32 y = t / (t + 2.0f);
  return x == x ? (x < 0.0f ? -y : y) : x;
}

}  // namespace
}  // namespace onepass::ONEPASS_ISA
