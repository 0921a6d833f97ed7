// A warp walks a ray, a sample a lane, 32 at a time: transmittance is a product scanned over the lanes and carried from
// step to step. All of it starts at the ray's first sample: no other ray and no layout changes a bit.
#pragma once
#include <cfloat>

#include "device.cuh"
#include "onepass/volrend.h"

namespace onepass::cuda {

inline constexpr float OPACITY_FLOOR = 0x1p-23f;
inline constexpr int FEW_CHANNELS = 4;  // a lane keeps the channels of its sample; beyond, lanes are channels

__device__ __forceinline__ float load_as(const void* p, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::bf16: return widen(static_cast<const __nv_bfloat16*>(p)[i]);
    case DType::f16: return widen(static_cast<const __half*>(p)[i]);
    default: return static_cast<const float*>(p)[i];
  }
}

__device__ __forceinline__ void store_as(void* p, DType dtype, int64_t i, float x) {
  switch (dtype) {
    case DType::bf16: static_cast<__nv_bfloat16*>(p)[i] = narrow<__nv_bfloat16>(x); break;
    case DType::f16: static_cast<__half*>(p)[i] = narrow<__half>(x); break;
    default: static_cast<float*>(p)[i] = x;
  }
}

// ---- scans over the lanes of a warp ----

__device__ __forceinline__ int lane_index() { return static_cast<int>(threadIdx.x) % WARP; }

__device__ __forceinline__ float shift_up(float x, float first) {
  const float y = __shfl_up_sync(ALL_LANES, x, 1);
  return lane_index() ? y : first;
}

__device__ __forceinline__ float shift_down(float x, float last) {
  const float y = __shfl_down_sync(ALL_LANES, x, 1);
  return lane_index() < WARP - 1 ? y : last;
}

__device__ __forceinline__ double scan_product(double x) {
#pragma unroll
  for (int by = 1; by < WARP; by *= 2) {
    const double y = __shfl_up_sync(ALL_LANES, x, by);
    if (lane_index() >= by) x *= y;
  }
  return x;
}

__device__ __forceinline__ float scan_sum(float x) {
#pragma unroll
  for (int by = 1; by < WARP; by *= 2) {
    const float y = __shfl_up_sync(ALL_LANES, x, by);
    if (lane_index() >= by) x += y;
  }
  return x;
}

__device__ __forceinline__ float scan_sum_down(float x) {
#pragma unroll
  for (int by = 1; by < WARP; by *= 2) {
    const float y = __shfl_down_sync(ALL_LANES, x, by);
    if (lane_index() + by < WARP) x += y;
  }
  return x;
}

// y_i = x_i + k_i y_{i+1} down from `last`, behind lane 31.
__device__ __forceinline__ float scan_affine_down(float x, float k, float last) {
#pragma unroll
  for (int by = 1; by < WARP; by *= 2) {
    const float y = __shfl_down_sync(ALL_LANES, x, by), l = __shfl_down_sync(ALL_LANES, k, by);
    if (lane_index() + by < WARP) {
      x = fmaf(k, y, x);
      k *= l;
    }
  }
  return fmaf(k, last, x);
}

__device__ __forceinline__ float first_lane(float x) { return __shfl_sync(ALL_LANES, x, 0); }
__device__ __forceinline__ float last_lane(float x) { return __shfl_sync(ALL_LANES, x, WARP - 1); }

// ---- a ray ----

struct Ray {
  int64_t index, first, count;  // first: of its samples, where they lie packed or the results do
  bool packed;

  __device__ float at(const Samples& s, int64_t i) const {
    return load_as(s.data, s.dtype, (packed ? first : index * s.step) + i);
  }
  template <class T>
  __device__ const T* features(const Composite& p) const {
    return static_cast<const T*>(p.features.data) + (packed ? first * p.n_channels : index * p.features.step);
  }
};

// Offsets that do not ascend inside the samples, which the host could not see, make an empty ray.
__device__ __forceinline__ Ray ray_at(const Composite& p, int64_t index) {
  if (!p.ray_offsets) return {index, index * p.n_samples, p.n_samples, false};
  const int64_t first = p.ray_offsets[index], last = p.ray_offsets[index + 1];
  if (first < 0 || last < first || last > p.n_samples) return {index, 0, 0, true};
  return {index, first, last - first, true};
}

struct Sample {
  float alpha, keep, mid, delta, sigma;
};

// Sample i of the ray; beyond its end one that absorbs nothing.
__device__ __forceinline__ Sample sample_at(const Composite& p, const Ray& ray, int64_t i) {
  if (i >= ray.count) return {0.0f, 1.0f, 0.0f, 0.0f, 0.0f};
  const float start = ray.at(p.t_starts, i), end = ray.at(p.t_ends, i), delta = end - start, mid = 0.5f * (start + end);
  if (p.alphas.data) {
    const float alpha = ray.at(p.alphas, i);
    return {alpha, 1.0f - alpha, mid, delta, 0.0f};
  }
  const float given = ray.at(p.sigmas, i);
  const float sigma = given > FLT_MAX ? FLT_MAX : given;  // an infinite sigma of no length absorbs nothing
  const float tau = -(sigma * delta);
  return {-expm1f(tau), expf(tau), mid, delta, sigma};
}

// What the walk knows behind the samples of a step. `in_front` and `reach` belong to the distortion:
// sum_{j<i} w_j and sum_{j<i} w_j (m_i - m_j).
struct Step {
  Sample sample;  // alpha and mid 0 where not composited
  bool lit;       // this lane's sample is composited
  float before, after, weight, in_front, reach;
};

struct Totals {
  int64_t live;  // samples composited
  float trans, opacity, depth, spread, median;
};

// visit(i, step) for each sample of each lane, those that are not lit too, up to the step that ends the light.
template <class Visit>
__device__ __forceinline__ Totals walk(const Composite& p, const Ray& ray, bool spreads, Visit&& visit) {
  Totals t{ray.count, p.prefix_trans ? p.prefix_trans[ray.index] : 1.0f, 0.0f, 0.0f, 0.0f, 0.0f};
  double trans = t.trans;  // so that no product rounds: float32 would lose twice what PyTorch loses
  float front = 0, reach = 0, edge = 0;
  bool crossed = false;
  for (int64_t begin = 0; begin < ray.count; begin += WARP) {
    const int64_t i = begin + lane_index();
    Step s{sample_at(p, ray, i), i < ray.count, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
    const double after = trans * scan_product(s.sample.keep), shifted = __shfl_up_sync(ALL_LANES, after, 1);
    const double before = lane_index() ? shifted : trans;
    s.after = static_cast<float>(after);
    s.before = static_cast<float>(before);
    const uint32_t dead = __ballot_sync(ALL_LANES, s.lit && !(s.before >= p.early_stop_eps));
    if (dead) {
      const int stop = __ffs(static_cast<int>(dead)) - 1;
      t.live = begin + stop;
      s.lit = lane_index() < stop;
      trans = __shfl_sync(ALL_LANES, before, stop);
    } else {
      trans = __shfl_sync(ALL_LANES, after, WARP - 1);
    }
    if (!s.lit) s.sample = {0.0f, 1.0f, 0.0f, 0.0f, 0.0f};
    s.weight = s.lit ? s.before * s.sample.alpha : 0.0f;
    t.opacity += s.weight;
    t.depth = fmaf(s.weight, s.sample.mid, t.depth);

    const uint32_t lit = __ballot_sync(ALL_LANES, s.lit);
    const uint32_t half = __ballot_sync(ALL_LANES, s.lit && s.after <= 0.5f);
    if (lit && !crossed) {
      const int chosen = half ? __ffs(static_cast<int>(half)) - 1 : WARP - 1 - __clz(lit);
      t.median = __shfl_sync(ALL_LANES, s.sample.mid, chosen);
      crossed = half != 0;
    }
    if (spreads && lit) {
      if (begin == 0) edge = first_lane(s.sample.mid);
      const float through = scan_sum(s.weight);
      s.in_front = front + shift_up(through, 0.0f);
      const float gap = s.sample.mid - shift_up(s.sample.mid, edge);
      s.reach = reach + scan_sum(s.lit ? s.in_front * gap : 0.0f);
      t.spread = fmaf(s.weight, fmaf(s.weight * s.sample.delta, 1.0f / 3.0f, 2.0f * s.reach), t.spread);
      front += last_lane(through);
      reach = last_lane(s.reach);
      edge = last_lane(s.sample.mid);
    }
    visit(i, s);
    if (dead) break;
  }
  t.trans = static_cast<float>(trans);
  t.opacity = warp_sum(t.opacity);
  t.depth = warp_sum(t.depth);
  if (spreads) t.spread = warp_sum(t.spread);
  return t;
}

}  // namespace onepass::cuda
