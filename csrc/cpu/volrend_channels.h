// Channels of a ray's samples against one value a sample: 1 to 4 of them as they lie, more in blocks of up to BLOCK, a
// sample at a time. Included by volrend.cpp alone.
#pragma once
#include <type_traits>

#include "lanes.h"
#include "volrend_ray.h"

namespace onepass::ONEPASS_ISA {
namespace {

constexpr int BLOCK = 4 * W;

// total[k] = sum_i w_i c_ik over the live samples.
template <int N, class T>
void sum_colors(const T* c, const float* w, int64_t live, float* total) {
  F32 part[N] = {};
  const auto step = [&](int64_t i, auto&& read) {
    const F32 weight = load(w + i);
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) part[j] = fma(repeat<N>(weight, j), read(i * N + j * W), part[j]);
  };
  int64_t i = 0;
  for (; i + W <= live; i += W) step(i, [&](int64_t at) { return load(c + at); });
  if (i < live) step(i, [&](int64_t at) { return load_n(c + at, lanes_left(at, live * N)); });
#pragma GCC unroll 4
  for (int k = 0; k < N; ++k) total[k] = sum(channel<N>(part, k));
}

// The same for n <= V W channels out of `width`. A whole vector may read on into the next sample, which it ignores.
template <int V, class T>
void sum_block(const T* c, const float* w, int64_t live, int64_t width, int n, float* total) {
  F32 part[V] = {};
  int64_t i = 0;
  for (; i * width + V * W <= (live - 1) * width + n; ++i) {
    const F32 weight = splat(w[i]);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) part[v] = fma(weight, load(c + i * width + v * W), part[v]);
  }
  for (; i < live; ++i)
    for (int v = 0; v < V; ++v)
      part[v] = fma(splat(w[i]), load_n(c + i * width + v * W, lanes_left(v * W, n)), part[v]);
  for (int v = 0; v < V; ++v) store(total + v * W, part[v]);
}

// dots[i] = g . c_i, and gradients w_i g where `out` is there.
template <int N, class T>
void dot_colors(const T* c, const float* g, const float* w, int64_t live, float* dots, T* out) {
  F32 grad[N];
#pragma GCC unroll 4
  for (int j = 0; j < N; ++j) grad[j] = cycle<N>(g, j);
  const auto step = [&](int64_t i, auto&& read, auto&& write) {
    F32 product[N];
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) product[j] = grad[j] * read(i * N + j * W);
    F32 dot = channel<N>(product, 0);
#pragma GCC unroll 4
    for (int k = 1; k < N; ++k) dot += channel<N>(product, k);
    store(dots + i, dot);
    if (!out) return;
    const F32 weight = load(w + i);
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) write(i * N + j * W, repeat<N>(weight, j) * grad[j]);
  };
  int64_t i = 0;
  for (; i + W <= live; i += W)
    step(i, [&](int64_t at) { return load(c + at); }, [&](int64_t at, F32 x) { store(out + at, x); });
  if (i < live)
    step(
        i, [&](int64_t at) { return load_n(c + at, lanes_left(at, live * N)); },
        [&](int64_t at, F32 x) { store_n(out + at, x, lanes_left(at, live * N)); });
}

// The same for n <= V W channels out of `width`, added to dots. A whole vector may write on into the next sample, which
// is written after it.
template <int V, class T>
void dot_block(const T* c, const float* g, const float* w, int64_t live, int64_t width, int n, float* dots, T* out) {
  F32 grad[V];
  for (int v = 0; v < V; ++v) grad[v] = load_n(g + v * W, lanes_left(v * W, n));
  const bool alone = n == width;  // else the next sample's place holds an earlier block's gradients
  for (int64_t i = 0; i < live; ++i) {
    const bool whole = i * width + V * W <= (live - 1) * width + n;
    F32 dot{};
    for (int v = 0; v < V; ++v) {
      const int left = lanes_left(v * W, n);
      const T* from = c + i * width + v * W;
      const F32 x = whole ? load(from) : load_n(from, left);
      dot = fma(grad[v], left < W ? (lanes() < left ? x : F32{}) : x, dot);
      if (!out) continue;
      store_n(out + i * width + v * W, w[i] * grad[v], whole && alone ? W : left);
    }
    dots[i] += sum(dot);
  }
}

// f(first channel, channels, number of vectors) over blocks of channels.
template <class F>
void for_each_block(int64_t width, F&& f) {
  for (int64_t k = 0; k < width; k += BLOCK) {
    const int n = width - k < BLOCK ? static_cast<int>(width - k) : BLOCK;
    if (n > 2 * W)
      f(k, n, std::integral_constant<int, 4>{});
    else if (n > W)
      f(k, n, std::integral_constant<int, 2>{});
    else
      f(k, n, std::integral_constant<int, 1>{});
  }
}

}  // namespace
}  // namespace onepass::ONEPASS_ISA
