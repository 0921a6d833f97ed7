// The Gumbel softmax, a row by a warp or by a block. Bytes: logits are read once and the sample written once (8 an
// element in float32; backward reads the gradient too, 12) where a row fits shared memory; a longer one is read, and
// its noise drawn, twice.
#pragma once
#include "onepass/gumbel.h"
#include "random.cuh"

namespace onepass::cuda {

inline constexpr int WIDE_BLOCK = 512;
inline constexpr int UNIT = NUMBERS;  // elements that a thread takes at a time

template <class T>
struct GumbelRow {
  const T *logits, *grad;
  T* out;
  NoiseAt at;
};

template <class T>
__device__ __forceinline__ GumbelRow<T> gumbel_row(const GumbelSoftmax& p, int64_t group) {
  const int64_t row = group / p.keyed, begin = group * p.n;
  return {static_cast<const T*>(p.logits) + begin, p.grad ? static_cast<const T*>(p.grad) + begin : nullptr,
          static_cast<T*>(p.out) + begin, noise_from(p.keys.at(row), begin - row * p.keyed * p.n)};
}

// body(i) for each unit of a thread, on a whole block of random numbers.
template <class T, int THREADS, class Body>
__device__ __forceinline__ void sweep(const GumbelSoftmax& p, const GumbelRow<T>& row, Body&& body) {
  for (int64_t i = place_in_group<THREADS>() * UNIT - row.at.skip; i < p.n; i += THREADS * UNIT) body(i);
}

// (logits + noise) / tau of a unit; -inf for elements outside.
template <class T>
__device__ __forceinline__ void noisy(const GumbelSoftmax& p, const GumbelRow<T>& row, int64_t i, float (&y)[UNIT]) {
  float g[UNIT];
  load(row.logits, i, p.n, y);
  draw(Distribution::gumbel, row.at.key,
       row.at.key.offset + static_cast<uint64_t>((row.at.first + row.at.skip + i) / NUMBERS), g);
#pragma unroll
  for (int j = 0; j < UNIT; ++j) y[j] = i + j >= 0 && i + j < p.n ? __fdiv_rn(add(y[j], g[j]), p.tau) : -INFINITY;
}

// An element of a row's sample; the largest is chosen, a NaN before all others as in argmax, and of equals the first.
struct Choice {
  float value;
  int64_t index;
};

__device__ __forceinline__ Choice better(const Choice& a, const Choice& b) {
  const bool a_nan = a.value != a.value, b_nan = b.value != b.value;
  const bool first = a.index < b.index;
  if (a_nan || b_nan) return a_nan && (!b_nan || first) ? a : b;
  return a.value > b.value || (a.value == b.value && first) ? a : b;
}

template <int THREADS>
__device__ __forceinline__ Choice best_of_group(Choice own) {
#pragma unroll
  for (int bit = WARP / 2; bit; bit /= 2)
    own = better(own, {__shfl_xor_sync(ALL_LANES, own.value, bit), __shfl_xor_sync(ALL_LANES, own.index, bit)});
  if constexpr (THREADS > WARP) {
    __shared__ Choice of_warps[THREADS / WARP];
    if (threadIdx.x % WARP == 0) of_warps[threadIdx.x / WARP] = own;
    __syncthreads();
    for (int warp = 0; warp < THREADS / WARP; ++warp) own = better(own, of_warps[warp]);
  }
  return own;
}

// What a row gives. weights(i, e, grad): exp(y - largest y) of a unit, and its gradient in backward; `total` is a
// thread's sum of e, `dot` that of e grad. They are joined in double and their quotient kept in two floats: where one e
// is almost all, its grad - dot / total cancels.
template <class T, int THREADS, class Weights>
__device__ __forceinline__ void put_row(const GumbelSoftmax& p, const GumbelRow<T>& row, float total, float dot,
                                        Weights&& weights) {
  const double sum = group_sum<THREADS>(static_cast<double>(total)), near = 1.0f / static_cast<float>(sum);
  const double inverse = near * (2.0 - sum * near);  // a step of Newton's from the float's
  const double quotient = row.grad ? group_sum<THREADS>(static_cast<double>(dot)) * inverse : 0.0;
  const float factor = static_cast<float>(inverse), mean = static_cast<float>(quotient);
  const float rest = static_cast<float>(quotient - mean);
  Choice own{-INFINITY, INT64_MAX};
  sweep<T, THREADS>(p, row, [&](int64_t i) {
    float x[UNIT], grad[UNIT] = {};
    weights(i, x, grad);
#pragma unroll
    for (int j = 0; j < UNIT; ++j) {
      x[j] *= factor;
      if (row.grad) x[j] = x[j] * (grad[j] - mean - rest) / p.tau;
      if (!p.hard) continue;
      if (i + j >= 0 && i + j < p.n) own = better(own, {x[j], i + j});
      x[j] = 0;
    }
    store(row.out, i, p.n, x);
  });
  if (!p.hard) return;
  if (best_of_group<THREADS>(own).index == own.index && own.index < p.n) row.out[own.index] = narrow<T>(1.0f);
}

__device__ __forceinline__ void keep(float* kept, const float (&x)[UNIT]) {
  *reinterpret_cast<float4*>(kept) = make_float4(x[0], x[1], x[2], x[3]);
}
__device__ __forceinline__ void recall(const float* kept, float (&x)[UNIT]) {
  const float4 four = *reinterpret_cast<const float4*>(kept);
  x[0] = four.x;
  x[1] = four.y;
  x[2] = four.z;
  x[3] = four.w;
}

// Rows that fit shared memory, `slots` floats of it, and as many again in backward; a thread reads what it wrote.
template <class T, int THREADS>
__global__ void __launch_bounds__(THREADS == WARP ? SHORT_BLOCK : THREADS, 1)
    gumbel_kept(int64_t groups, GumbelSoftmax p, int64_t slots) {
  const int64_t group = group_index<THREADS>();
  if (group >= groups) return;
  const GumbelRow<T> row = gumbel_row<T>(p, group);
  float* kept = reinterpret_cast<float*>(dynamic_shared()) + row.at.skip;
  if constexpr (THREADS == WARP) kept += threadIdx.x / WARP * slots * (p.grad ? 2 : 1);
  float* kept_grad = kept + slots;

  float top = -INFINITY, total = 0, dot = 0;
  sweep<T, THREADS>(p, row, [&](int64_t i) {
    float y[UNIT];
    noisy(p, row, i, y);
    keep(kept + i, y);
#pragma unroll
    for (int j = 0; j < UNIT; ++j) top = fmaxf(top, y[j]);
  });
  top = group_max<THREADS>(top);
  sweep<T, THREADS>(p, row, [&](int64_t i) {
    float e[UNIT], grad[UNIT] = {};
    recall(kept + i, e);
    if (row.grad) {
      load(row.grad, i, p.n, grad);
      keep(kept_grad + i, grad);
    }
#pragma unroll
    for (int j = 0; j < UNIT; ++j) {
      e[j] = expf(e[j] - top);
      total += e[j];
      dot = fmaf(e[j], grad[j], dot);
    }
    keep(kept + i, e);
  });
  put_row<T, THREADS>(p, row, total, dot, [&](int64_t i, float (&e)[UNIT], float (&grad)[UNIT]) {
    recall(kept + i, e);
    if (row.grad) recall(kept_grad + i, grad);
  });
}

// Longer rows: an online softmax of each thread's units, then all of it again.
template <class T>
__global__ void __launch_bounds__(WIDE_BLOCK, 1) gumbel_again(GumbelSoftmax p) {
  const GumbelRow<T> row = gumbel_row<T>(p, blockIdx.x);
  float most = -INFINITY, total = 0, dot = 0;
  sweep<T, WIDE_BLOCK>(p, row, [&](int64_t i) {
    float y[UNIT], grad[UNIT] = {};
    noisy(p, row, i, y);
    if (row.grad) load(row.grad, i, p.n, grad);
    float larger = most;
#pragma unroll
    for (int j = 0; j < UNIT; ++j) larger = fmaxf(larger, y[j]);
    const float base = larger == -INFINITY ? 0.0f : larger, shrink = expf(most - base);
    total *= shrink;
    dot *= shrink;
#pragma unroll
    for (int j = 0; j < UNIT; ++j) {
      const float e = expf(y[j] - base);
      total += e;
      dot = fmaf(e, grad[j], dot);
    }
    most = larger;
  });
  const float top = group_max<WIDE_BLOCK>(most), shrink = expf(most - top);
  put_row<T, WIDE_BLOCK>(p, row, total * shrink, dot * shrink, [&](int64_t i, float (&e)[UNIT], float (&grad)[UNIT]) {
    noisy(p, row, i, e);
    if (row.grad) load(row.grad, i, p.n, grad);
#pragma unroll
    for (int j = 0; j < UNIT; ++j) e[j] = expf(e[j] - top);
  });
}

}  // namespace onepass::cuda
