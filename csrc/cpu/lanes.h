// Moving values between the lanes of a vector: permutations, prefix scans, and interleaved channels. Included by
// csrc/cpu/*.cpp alone. Index vectors are built in loops over constants, which the compiler folds.
#pragma once
#include "vec.h"

namespace onepass::ONEPASS_ISA {

OP_INLINE F32 permute(F32 x, I32 from) {
#if defined(__AVX512F__)
  return _mm512_permutexvar_ps((__m512i)from, x);
#elif defined(__AVX2__)
  return _mm256_permutevar8x32_ps(x, (__m256i)from);
#else
  F32 y;
  for (int i = 0; i < W; ++i) y[i] = x[from[i] & (W - 1)];
  return y;
#endif
}

// Lane i is lane from[i] of x, or from[i] - W of y.
OP_INLINE F32 permute(F32 x, F32 y, I32 from) {
#if defined(__AVX512F__)
  return _mm512_permutex2var_ps(x, (__m512i)from, y);
#else
  return from < W ? permute(x, from) : permute(y, from - W);
#endif
}

OP_INLINE uint32_t lane_bits(I32 mask) {  // bit i is the sign of lane i
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)mask);
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps((__m256)mask));
#else
  uint32_t bits = 0;
  for (int i = 0; i < W; ++i) bits |= static_cast<uint32_t>(mask[i] < 0) << i;
  return bits;
#endif
}

OP_INLINE I32 lanes() { return (I32)iota(); }
OP_INLINE F32 first_lane(F32 x) { return permute(x, I32{}); }
OP_INLINE F32 last_lane(F32 x) { return permute(x, splat_i32(W - 1)); }

// Lanes one up or one down, with the end filled from `edge`.
OP_INLINE F32 shift_up(F32 x, F32 edge, int by = 1) { return lanes() >= by ? permute(x, lanes() - by) : edge; }
OP_INLINE F32 shift_down(F32 x, F32 edge, int by = 1) { return lanes() < W - by ? permute(x, lanes() + by) : edge; }

// A product as head + tail: the tail holds what rounding the head lost, so a long one is as good as a short one.
struct Product {
  F32 head, tail;

  F32 value() const { return head + tail; }
};
OP_INLINE Product multiply(F32 a, F32 b) {
  const F32 head = a * b;
  return {head, fma(a, b, -head)};
}
OP_INLINE Product multiply(Product a, Product b) {
  const Product heads = multiply(a.head, b.head);
  return {heads.head, fma(a.head, b.tail, fma(a.tail, b.head, heads.tail))};
}

// Inclusive scans. The tree is fixed by the lane, so a ray's result depends on where the ray starts alone.
OP_INLINE Product scan_product(F32 x) {
  Product p = multiply(x, shift_up(x, splat(1.0f)));
#pragma GCC unroll 4
  for (int by = 2; by < W; by *= 2)
    p = multiply(p, Product{shift_up(p.head, splat(1.0f), by), shift_up(p.tail, F32{}, by)});
  return p;
}
OP_INLINE F32 scan_sum(F32 x) {
#pragma GCC unroll 4
  for (int by = 1; by < W; by *= 2) x = x + shift_up(x, F32{}, by);
  return x;
}
OP_INLINE F32 scan_sum_down(F32 x) {
#pragma GCC unroll 4
  for (int by = 1; by < W; by *= 2) x = x + shift_down(x, F32{}, by);
  return x;
}
// x_i = value_i + keep_i x_{i+1}, from the last lane down; `after` stands behind the last lane.
OP_INLINE F32 scan_affine_down(F32 value, F32 keep, F32 after) {
#pragma GCC unroll 4
  for (int by = 1; by < W; by *= 2) {
    value = fma(keep, shift_down(value, F32{}, by), value);
    keep = keep * shift_down(keep, splat(1.0f), by);
  }
  return fma(keep, after, value);
}

// W samples of N channels lie in N vectors. repeat<N>(x, j): the sample's x beside each element of vector j.
template <int N>
OP_INLINE F32 repeat(F32 x, int j) {
  if (N == 1) return x;
  I32 from;
  for (int i = 0; i < W; ++i) from[i] = (j * W + i) / N;
  return permute(x, from);
}
// cycle<N>(x, j): channel c's x[c] beside each element of vector j.
template <int N>
OP_INLINE F32 cycle(const float* x, int j) {
  F32 y;
  for (int i = 0; i < W; ++i) y[i] = x[(j * W + i) % N];
  return y;
}
// The sum over channels (or, with one c, channel c alone) of every sample, from its N vectors.
template <int N>
OP_INLINE F32 channel(const F32* v, int c) {
  if (N == 1) return v[0];
  I32 from;
  for (int i = 0; i < W; ++i) from[i] = (N * i + c) % (2 * W);
  F32 x = permute(v[0], v[1], from);
  if (N > 2) {
    for (int i = 0; i < W; ++i) from[i] = N * i + c < 2 * W ? i : (N * i + c - 2 * W) % W + W;
    if (N == 3) return permute(x, v[2], from);
    F32 y = permute(v[2 % N], v[3 % N], [&] {
      I32 upper;
      for (int i = 0; i < W; ++i) upper[i] = (N * i + c + 2 * W) % (2 * W);
      return upper;
    }());
    I32 low;
    for (int i = 0; i < W; ++i) low[i] = N * i + c < 2 * W ? -1 : 0;
    x = low ? x : y;
  }
  return x;
}

}  // namespace onepass::ONEPASS_ISA
