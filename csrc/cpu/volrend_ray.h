// A ray in hand: its samples in memory, the light along it, and how rays are shared out. Included by volrend.cpp alone.
#pragma once
#include "onepass/volrend.h"

#include "lanes.h"
#include "range.h"

namespace onepass::ONEPASS_ISA {
namespace {

constexpr float LARGEST = 0x1.fffffep127f;

// The samples of one ray in one tensor.
struct Row {
  const void* data;
  DType dtype;

  F32 load(int64_t i, int n) const {
    switch (dtype) {
      case DType::f32: return load_n(static_cast<const float*>(data) + i, n);
      case DType::bf16: return load_n(static_cast<const BF16*>(data) + i, n);
      default: return load_n(static_cast<const F16*>(data) + i, n);
    }
  }
};

// A row to be written; null where nothing is wanted.
struct RowOut {
  void* data;
  DType dtype;

  void store(int64_t i, F32 x, int n) const {
    switch (dtype) {
      case DType::f32: return store_n(static_cast<float*>(data) + i, x, n);
      case DType::bf16: return store_n(static_cast<BF16*>(data) + i, x, n);
      default: return store_n(static_cast<F16*>(data) + i, x, n);
    }
  }
  void clear(int64_t begin, int64_t end) const {
    if (!data || begin >= end) return;
    const int64_t size = dtype == DType::f32 ? 4 : 2;
    std::memset(static_cast<char*>(data) + begin * size, 0, static_cast<size_t>((end - begin) * size));
  }
};

template <class V>
V* move(V* p, DType dtype, int64_t elements) {
  using Byte = std::conditional_t<std::is_const_v<V>, const char, char>;
  return p ? static_cast<Byte*>(p) + elements * (dtype == DType::f32 ? 4 : 2) : nullptr;
}

void put(void* p, DType dtype, int64_t i, float x) { RowOut{p, dtype}.store(i, splat(x), 1); }

struct Ray {
  int64_t index, first, count;  // first: of its samples among all, as the outputs lie
  Row sigmas, alphas, t_starts, t_ends, features;

  Ray(const Composite& p, int64_t r) : index(r) {
    first = p.ray_offsets ? p.ray_offsets[r] : r * p.n_samples;
    count = p.ray_offsets ? p.ray_offsets[r + 1] - first : p.n_samples;
    sigmas = row(p, p.sigmas);
    alphas = row(p, p.alphas);
    t_starts = row(p, p.t_starts);
    t_ends = row(p, p.t_ends);
    features = row(p, p.features, p.n_channels);
  }
  Row row(const Composite& p, const Samples& s, int64_t width = 1) const {
    return {move(s.data, s.dtype, p.ray_offsets ? first * width : index * s.step), s.dtype};
  }
  RowOut out(void* data, DType dtype, int64_t width = 1) const { return {move(data, dtype, first * width), dtype}; }
  F32 mids(int64_t i, int n) const { return 0.5f * (t_starts.load(i, n) + t_ends.load(i, n)); }
  F32 deltas(int64_t i, int n) const { return t_ends.load(i, n) - t_starts.load(i, n); }
  F32 bounded_sigmas(int64_t i, int n) const { return min(splat(LARGEST), sigmas.load(i, n)); }  // NaN stays
};

// A task's arrays, one value a sample of the ray in hand, each with room for a vector beyond the end.
struct Scratch {
  float *weights, *trans, *alphas, *dots, *reach, *in_front;

  Scratch(const Composite& p, int64_t task) {
    const int64_t size = composite_scratch(p.n_samples), part = size / 6;
    float* base = p.scratch + task * size;
    weights = base;
    trans = base + part;  // trans[i] in front of sample i, trans[count] behind the last
    alphas = base + 2 * part;
    dots = base + 3 * part;
    reach = base + 4 * part;
    in_front = base + 5 * part;
  }
};

int lanes_left(int64_t i, int64_t end) { return end - i < W ? static_cast<int>(end - i) : W; }

struct March {
  int64_t live;                 // samples composited
  float trans, opacity, depth;  // light left behind them, sum w, sum w m
};

// Fills weights, trans and alphas up to the first sample in front of which less than early_stop_eps is left.
March march(const Composite& p, const Ray& ray, const Scratch& s) {
  Product carry{splat(p.prefix_trans ? p.prefix_trans[ray.index] : 1.0f), F32{}};
  F32 opacity{}, depth{};
  const F32 eps = splat(p.early_stop_eps);
  const bool given = p.alphas.data != nullptr;
  int64_t live = ray.count;
  s.trans[0] = carry.head[0];
  for (int64_t i = 0; i < ray.count; i += W) {
    const int n = lanes_left(i, ray.count);
    const F32 start = ray.t_starts.load(i, n), end = ray.t_ends.load(i, n);
    F32 alpha, keep;  // lanes beyond the ray absorb nothing
    if (given) {
      alpha = ray.alphas.load(i, n);
      keep = 1.0f - alpha;
    } else {
      const F32 tau = ray.bounded_sigmas(i, n) * (start - end);
      alpha = -expm1(tau);
      keep = exp(tau);
    }
    const Product through = multiply(carry, scan_product(keep));
    const F32 after = through.value(), before = shift_up(after, carry.value());
    F32 mid = 0.5f * (start + end);
    const uint32_t dead = ~lane_bits(before >= eps) & ((1u << n) - 1u);
    const int stop = dead ? __builtin_ctz(dead) : W;
    const I32 lit = lanes() < stop;
    if (dead) {
      live = i + stop;
      alpha = lit ? alpha : F32{};
      mid = lit ? mid : F32{};
      carry = {splat(before[stop]), F32{}};
    }
    const F32 weight = dead ? (lit ? before * alpha : F32{}) : before * alpha;
    opacity += weight;
    depth = fma(weight, mid, depth);
    store(s.weights + i, weight);
    store(s.alphas + i, alpha);
    store(s.trans + i + 1, after);
    if (dead) break;
    carry = {last_lane(after), last_lane(through.tail - (after - through.head))};
  }
  return {live, carry.value()[0], sum(opacity), sum(depth)};
}

// E_i = sum_{j<i} w_j (m_i - m_j) and the weight in front of every sample, for the distortion, which is returned.
float spread(const Ray& ray, const Scratch& s, int64_t live) {
  F32 front{}, reach{}, edge{}, total{};
  for (int64_t i = 0; i < live; i += W) {
    const int n = lanes_left(i, live);
    const F32 w = load(s.weights + i), mid = ray.mids(i, n), delta = ray.deltas(i, n);
    const F32 through = scan_sum(w), before = front + shift_up(through, F32{});
    const F32 e = reach + scan_sum(before * (mid - shift_up(mid, edge)));
    store(s.in_front + i, before);
    store(s.reach + i, e);
    total = fma(w, fma(w * delta, splat(1.0f / 3.0f), 2.0f * e), total);
    front += last_lane(through);
    reach = last_lane(e);
    edge = last_lane(mid);
  }
  return sum(total);
}

float middle(const Ray& ray, const Scratch& s, int64_t live) {
  if (live == 0) return 0.0f;
  int64_t at = live - 1;
  for (int64_t i = 0; i < live; i += W) {
    const uint32_t crossed = lane_bits(load(s.trans + i + 1) <= 0.5f);
    if (!crossed) continue;
    const int64_t found = i + __builtin_ctz(crossed);
    at = found < at ? found : at;
    break;
  }
  return ray.mids(at, 1)[0];
}

// The rays of a task: as many in each, or as many samples where they are packed.
int64_t first_ray(const Composite& p, int64_t task) {
  if (!p.ray_offsets) return p.n_rays * task / p.tasks;
  const auto cost = [&](int64_t r) { return p.ray_offsets[r] + 8 * r; };
  const int64_t wanted =
      static_cast<int64_t>(static_cast<double>(cost(p.n_rays)) * static_cast<double>(task) / p.tasks);
  int64_t low = 0, high = p.n_rays;
  while (low < high) {
    const int64_t half = (low + high) / 2;
    if (cost(half) < wanted)
      low = half + 1;
    else
      high = half;
  }
  return task == p.tasks ? p.n_rays : low;
}

template <class Body>
void for_each_ray(const Composite& p, Body&& body) {
  parallel_for(p.tasks, 1, p.num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const Scratch s(p, task);
      const int64_t last = first_ray(p, task + 1);
      for (int64_t r = first_ray(p, task); r < last; ++r) body(Ray(p, r), s);
    }
  });
}

}  // namespace
}  // namespace onepass::ONEPASS_ISA
