// Compositing along rays, dense or packed, forward and backward, a warp a ray. Bytes: forward reads sigma, two times
// and N channels a sample (24 for float32 colors) and writes a few values a ray; backward reads as much twice, the
// second time mostly from the L2 cache, and writes up to the same again. Up to four channels a lane keeps those of its
// sample; with more, weights go through scratch and lanes are channels, so that features are read side by side.
#pragma once
#include "ray.cuh"

namespace onepass::cuda {

// Floats of scratch for each sample and ray: forward 1 with more than FEW_CHANNELS, backward 5.
struct RayScratch {
  float *weights, *dots, *trans, *in_front, *reach;
};

__device__ __forceinline__ RayScratch scratch_of(const Composite& p, const Ray& ray, int64_t samples) {
  const int64_t part = samples + p.n_rays;
  float* base = p.scratch + ray.first + ray.index;
  return {base, base + part, base + 2 * part, base + 3 * part, base + 4 * part};
}

template <class T>
__global__ void __launch_bounds__(SHORT_BLOCK) render(Composite p, CompositeOut out, int64_t samples) {
  const int64_t index = group_index<WARP>();
  if (index >= p.n_rays) return;
  const Ray ray = ray_at(p, index);
  const RayScratch scratch = scratch_of(p, ray, samples);
  const int width = static_cast<int>(p.n_channels), lane = lane_index();
  const bool few = width <= FEW_CHANNELS;
  const DType density = p.sigmas.data ? p.sigmas.dtype : p.alphas.dtype, time = p.t_starts.dtype;
  const T* features = ray.features<T>(p);
  float color[FEW_CHANNELS] = {};
  const Totals t = walk(p, ray, out.distortion != nullptr, [&](int64_t i, const Step& s) {
    if (few && s.lit) {
#pragma unroll
      for (int k = 0; k < FEW_CHANNELS; ++k)
        if (k < width) color[k] = fmaf(s.weight, widen(features[i * width + k]), color[k]);
    }
    if (!few && s.lit) scratch.weights[i] = s.weight;
    if (out.weights && i < ray.count) store_as(out.weights, density, ray.first + i, s.weight);
  });
  if (out.weights)  // behind the step that ended the light
    for (int64_t i = (t.live + WARP) / WARP * WARP + lane; i < ray.count; i += WARP)
      store_as(out.weights, density, ray.first + i, 0.0f);

  T* result = static_cast<T*>(out.features) + index * width;
  const float* background = p.background ? p.background + index * p.background_step : nullptr;
  if (few) {
#pragma unroll
    for (int k = 0; k < FEW_CHANNELS; ++k) {
      if (k >= width) break;
      const float total = warp_sum(color[k]);
      if (lane == 0) result[k] = narrow<T>(background ? fmaf(t.trans, background[k], total) : total);
    }
  } else {
    __syncwarp();
    for (int k = lane; k < width; k += WARP) {
      float total = 0;
      for (int64_t i = 0; i < t.live; ++i) total = fmaf(scratch.weights[i], widen(features[i * width + k]), total);
      result[k] = narrow<T>(background ? fmaf(t.trans, background[k], total) : total);
    }
  }
  if (lane != 0) return;
  float depth = t.depth;
  if (p.depth == Depth::normalized) depth /= t.opacity < OPACITY_FLOOR ? OPACITY_FLOOR : t.opacity;
  if (p.depth == Depth::median) depth = t.median;
  store_as(out.depth, time, index, depth);
  store_as(out.opacity, density, index, t.opacity);
  if (out.distortion) store_as(out.distortion, time, index, t.spread);
}

// What reaches a ray from behind, for one unit of sum w m, of opacity and of distortion; and of the background's light.
struct Behind {
  float depth, opacity, spread, background;
};

__device__ __forceinline__ Behind behind(const Composite& p, const Ray& ray, const Totals& t,
                                         const CompositeGradIn& in) {
  const auto of = [&](const float* g) { return g ? g[ray.index] : 0.0f; };
  Behind b{p.depth == Depth::median ? 0.0f : of(in.depth), of(in.opacity), of(in.distortion), 0.0f};
  if (p.depth == Depth::normalized) {
    const bool floored = t.opacity < OPACITY_FLOOR;
    b.depth /= floored ? OPACITY_FLOOR : t.opacity;
    if (!floored) b.opacity -= b.depth * (t.depth / t.opacity);
  }
  if (p.background && in.features) {
    float light = 0;
    for (int64_t k = lane_index(); k < p.n_channels; k += WARP)
      light = fmaf(in.features[ray.index * p.n_channels + k], p.background[ray.index * p.background_step + k], light);
    b.background = warp_sum(light);
  }
  return b;
}

// With lanes as channels: each sample's features times the gradient, summed, and the gradient of the features.
template <class T>
__device__ __forceinline__ void dot_channels(const Composite& p, const T* features, const float* g, int64_t live,
                                             const RayScratch& scratch, T* out) {
  const int64_t width = p.n_channels;
  for (int64_t i = 0; i < live; ++i) {
    const float weight = scratch.weights[i];
    float dot = 0;
    for (int64_t k = lane_index(); k < width; k += WARP) {
      dot = fmaf(widen(features[i * width + k]), g[k], dot);
      if (out) out[i * width + k] = narrow<T>(weight * g[k]);
    }
    dot = warp_sum(dot);
    if (lane_index() == 0) scratch.dots[i] = dot;
  }
  __syncwarp();
}

template <class T>
__global__ void __launch_bounds__(SHORT_BLOCK)
    render_backward(Composite p, CompositeGradIn in, CompositeGradOut out, int64_t samples) {
  const int64_t index = group_index<WARP>();
  if (index >= p.n_rays) return;
  const Ray ray = ray_at(p, index);
  const RayScratch scratch = scratch_of(p, ray, samples);
  const int width = static_cast<int>(p.n_channels), lane = lane_index();
  const bool few = width <= FEW_CHANNELS, spreads = in.distortion && in.distortion[index] != 0.0f;
  const T* features = ray.features<T>(p);
  const float* g = in.features ? in.features + index * width : nullptr;
  T* d_features = out.features ? static_cast<T*>(out.features) + ray.first * width : nullptr;

  // Front to back: what the way back needs of each sample, in scratch.
  const Totals t = walk(p, ray, spreads, [&](int64_t i, const Step& s) {
    if (!s.lit) return;
    scratch.weights[i] = s.weight;
    if (i == 0) scratch.trans[0] = s.before;
    scratch.trans[i + 1] = s.after;  // the next lane's, after __syncwarp
    if (!spreads) return;
    scratch.in_front[i] = s.in_front;
    scratch.reach[i] = s.reach;
  });
  __syncwarp();
  if (!few && g) dot_channels(p, features, g, t.live, scratch, d_features);
  if (d_features)
    for (int64_t j = (g ? t.live : 0) * width + lane; j < ray.count * width; j += WARP) d_features[j] = narrow<T>(0.0f);
  const Behind b = behind(p, ray, t, in);

  // Back to front: `ladder` is what one unit of light is worth behind a step's samples, `worth` sum_{j>i} w_j (m_j -
  // m_i), `rest` sum_{j>i} w_j, `edge` the middle of the first sample behind the step.
  float ladder = b.background, worth = 0, rest = 0, edge = 0;
  for (int64_t begin = t.live > 0 ? (t.live - 1) / WARP * WARP : -1; begin >= 0; begin -= WARP) {
    const int64_t i = begin + lane;
    const bool lit = i < t.live;
    Sample s = {0.0f, 1.0f, 0.0f, 0.0f, 0.0f};
    float w = 0, gain = 0, d_delta = 0;
    if (lit) {
      s = sample_at(p, ray, i);
      w = scratch.weights[i];
      if (!few && g) gain = scratch.dots[i];
      if (few && g) {
#pragma unroll
        for (int k = 0; k < FEW_CHANNELS; ++k) {
          if (k >= width) break;
          gain = fmaf(widen(features[i * width + k]), g[k], gain);
          if (d_features) d_features[i * width + k] = narrow<T>(w * g[k]);
        }
      }
      gain += fmaf(b.depth, s.mid, b.opacity);
      if (in.weights.data) gain += ray.at(in.weights, i);
    }
    float d_mid = b.depth * w;
    if (spreads) {
      const float from = rest + scan_sum_down(w), at_back = shift_down(from, rest);
      const float next = shift_down(s.mid, edge);
      // The gap to a lane beyond the ray, or to an edge that is not there, holds no weight.
      const float step = i + 1 < t.live ? at_back * (next - s.mid) : 0.0f;
      const float ahead = worth + scan_sum_down(step);
      if (lit) {
        gain = fmaf(b.spread, fmaf(w * s.delta, 2.0f / 3.0f, 2.0f * (scratch.reach[i] + ahead)), gain);
        d_mid = fmaf(2.0f * b.spread * w, scratch.in_front[i] - at_back, d_mid);
        d_delta = b.spread * w * w * (1.0f / 3.0f);
      }
      worth = first_lane(ahead);
      rest = first_lane(from);
      edge = first_lane(s.mid);
    }
    const float here = scan_affine_down(s.alpha * gain, s.keep, ladder);
    gain -= shift_down(here, ladder);
    ladder = first_lane(here);
    if (!lit) continue;
    const float d_tau = scratch.trans[i + 1] * gain;
    if (out.alphas) store_as(out.alphas, p.alphas.dtype, ray.first + i, scratch.trans[i] * gain);
    if (out.sigmas) store_as(out.sigmas, p.sigmas.dtype, ray.first + i, s.delta * d_tau);
    if (p.sigmas.data) d_delta = fmaf(s.sigma, d_tau, d_delta);
    if (out.t_starts) store_as(out.t_starts, p.t_starts.dtype, ray.first + i, fmaf(0.5f, d_mid, -d_delta));
    if (out.t_ends) store_as(out.t_ends, p.t_ends.dtype, ray.first + i, fmaf(0.5f, d_mid, d_delta));
  }
  for (int64_t i = t.live + lane; i < ray.count; i += WARP) {
    if (out.alphas) store_as(out.alphas, p.alphas.dtype, ray.first + i, 0.0f);
    if (out.sigmas) store_as(out.sigmas, p.sigmas.dtype, ray.first + i, 0.0f);
    if (out.t_starts) store_as(out.t_starts, p.t_starts.dtype, ray.first + i, 0.0f);
    if (out.t_ends) store_as(out.t_ends, p.t_ends.dtype, ray.first + i, 0.0f);
  }
  if (out.background && p.background_step)
    for (int k = lane; k < width; k += WARP) out.background[index * width + k] = g ? t.trans * g[k] : 0.0f;
  if (lane != 0) return;
  if (out.prefix_trans) out.prefix_trans[index] = ladder;
  out.left[index] = t.trans;
}

// The gradient of a background that all rays share: a block a channel, in an order that the number of rays decides.
__global__ void __launch_bounds__(BLOCK)
    add_background(const float* grad, const float* left, int64_t n_rays, int64_t n_channels, float* out) {
  __shared__ double partial[BLOCK];
  const int t = static_cast<int>(threadIdx.x);
  const int64_t k = blockIdx.x;
  double total = 0;
  for (int64_t r = t; r < n_rays; r += BLOCK) total += static_cast<double>(left[r]) * grad[r * n_channels + k];
  partial[t] = total;
  for (int half = BLOCK / 2; half; half /= 2) {
    __syncthreads();
    if (t < half) partial[t] += partial[t + half];
  }
  if (t == 0) out[k] = static_cast<float>(partial[0]);
}

}  // namespace onepass::cuda
