// Compositing along rays, dense or packed, forward and backward. Bound by memory: forward reads sigma, two times and
// N channels a sample, 24 bytes for float32 colors (20 where starts and ends are views of the same edges); backward
// reads as much and writes up to the same again. Everything between lives in the first-level cache.
//
// A ray is walked W samples at a time. Transmittance is a product over all earlier samples; it is scanned inside a
// vector and carried from vector to vector, so exp is vectorised and the chain costs one multiply a vector. Weights
// go to scratch, then colors are summed with the weights: 1 to 4 channels interleaved as they lie (each vector of
// features meets a permuted vector of weights), more channels a sample at a time. Backward walks forward once to know
// the transmittance, and then from the far end, where a linear recursion gives what lies behind each sample without
// dividing by 1 - alpha. All of it starts at the ray's first sample: no other ray, thread count or layout changes a
// bit.
#include "onepass/volrend.h"

#include "volrend_channels.h"
#include "volrend_ray.h"

namespace onepass::ONEPASS_ISA {
namespace {

constexpr float OPACITY_FLOOR = 0x1p-23f;

// ---- forward ----

template <class T>
void write_colors(const Composite& p, const Ray& ray, const Scratch& s, const March& m, T* out) {
  const T* c = static_cast<const T*>(ray.features.data);
  const float* background = p.background ? p.background + ray.index * p.background_step : nullptr;
  const auto finish = [&](const float* total, int64_t k, int n) {
    for (int v = 0; v < n; v += W) {
      F32 x = load(total + v);
      if (background) x = fma(splat(m.trans), load_n(background + k + v, lanes_left(v, n)), x);
      store_n(out + k + v, x, lanes_left(v, n));
    }
  };
  float total[BLOCK] = {};
  const int64_t width = p.n_channels;
  switch (width) {
    case 1: sum_colors<1>(c, s.weights, m.live, total); break;
    case 2: sum_colors<2>(c, s.weights, m.live, total); break;
    case 3: sum_colors<3>(c, s.weights, m.live, total); break;
    case 4: sum_colors<4>(c, s.weights, m.live, total); break;
    default:
      return for_each_block(width, [&](int64_t k, int n, auto v) {
        sum_block<v.value>(c + k, s.weights, m.live, width, n, total);
        finish(total, k, n);
      });
  }
  finish(total, 0, static_cast<int>(width));
}

void forward(const Composite& p, const CompositeOut& out) {
  const DType density = p.sigmas.dtype, time = p.t_starts.dtype;  // of no samples there is no pointer to ask
  with_dtype(p.features.dtype, [&](auto t) {
    for_each_ray(p, [&](const Ray& ray, const Scratch& s) {
      const March m = march(p, ray, s);
      write_colors(p, ray, s, m, static_cast<decltype(t)*>(out.features) + ray.index * p.n_channels);
      float depth = m.depth;
      if (p.depth == Depth::normalized) depth /= m.opacity < OPACITY_FLOOR ? OPACITY_FLOOR : m.opacity;
      if (p.depth == Depth::median) depth = middle(ray, s, m.live);
      put(out.depth, time, ray.index, depth);
      put(out.opacity, density, ray.index, m.opacity);
      if (out.distortion) put(out.distortion, time, ray.index, spread(ray, s, m.live));
      if (!out.weights) return;
      const RowOut weights = ray.out(out.weights, density);
      for (int64_t i = 0; i < m.live; i += W) weights.store(i, load(s.weights + i), lanes_left(i, m.live));
      weights.clear(m.live, ray.count);
    });
  });
}

// ---- backward ----

template <class T>
void write_dots(const Composite& p, const Ray& ray, const Scratch& s, int64_t live, const float* g, T* out) {
  const T* c = static_cast<const T*>(ray.features.data);
  const int64_t width = p.n_channels;
  switch (g ? width : 0) {
    case 1: return dot_colors<1>(c, g, s.weights, live, s.dots, out);
    case 2: return dot_colors<2>(c, g, s.weights, live, s.dots, out);
    case 3: return dot_colors<3>(c, g, s.weights, live, s.dots, out);
    case 4: return dot_colors<4>(c, g, s.weights, live, s.dots, out);
    default: break;
  }
  for (int64_t i = 0; i < live; i += W) store(s.dots + i, F32{});
  if (g)
    for_each_block(width, [&](int64_t k, int n, auto v) {
      dot_block<v.value>(c + k, g + k, s.weights, live, width, n, s.dots, out ? out + k : nullptr);
    });
  else if (out)
    RowOut{out, p.features.dtype}.clear(0, live * width);
}

// What reaches a ray from behind, for one unit of sum w m, of opacity and of distortion.
struct Behind {
  float depth, opacity, spread, background;
  Row weights;
};

Behind behind(const Composite& p, const Ray& ray, const March& m, const CompositeGradIn& in) {
  const auto of = [&](const float* g) { return g ? g[ray.index] : 0.0f; };
  Behind b{p.depth == Depth::median ? 0.0f : of(in.depth), of(in.opacity), of(in.distortion), 0.0f,
           ray.row(p, in.weights)};
  if (p.depth == Depth::normalized) {
    const bool floored = m.opacity < OPACITY_FLOOR;
    b.depth /= floored ? OPACITY_FLOOR : m.opacity;
    if (!floored) b.opacity -= b.depth * (m.depth / m.opacity);
  }
  if (p.background && in.features)
    for (int64_t k = 0; k < p.n_channels; ++k)
      b.background += in.features[ray.index * p.n_channels + k] * p.background[ray.index * p.background_step + k];
  return b;
}

struct SampleGrads {
  RowOut sigmas, alphas, t_starts, t_ends;

  void clear(int64_t begin, int64_t end) const {
    sigmas.clear(begin, end);
    alphas.clear(begin, end);
    t_starts.clear(begin, end);
    t_ends.clear(begin, end);
  }
};

// From the far end: `ladder` is what one unit of light is worth behind a vector of samples. Returns it at the near end.
float far_to_near(const Ray& ray, const Scratch& s, int64_t live, const Behind& b, const SampleGrads& out) {
  F32 ladder = splat(b.background), worth{}, rest{};  // worth: sum_{j>i} w_j (m_j - m_i), rest: sum_{j>i} w_j
  F32 edge{};                                         // the middle of the first sample behind the vector
  for (int64_t i = (live - 1) / W * W; i >= 0 && live > 0; i -= W) {
    const int n = lanes_left(i, live);
    const F32 w = load(s.weights + i), alpha = load(s.alphas + i), mid = ray.mids(i, n), delta = ray.deltas(i, n);
    F32 gain = load(s.dots + i) + fma(splat(b.depth), mid, splat(b.opacity)), d_mid = b.depth * w, d_delta{};
    if (b.weights.data) gain += b.weights.load(i, n);
    if (b.spread != 0.0f) {
      const F32 from = rest + scan_sum_down(w), at_back = shift_down(from, rest);
      worth = worth + scan_sum_down(at_back * (shift_down(mid, edge) - mid));  // lanes beyond the ray hold no weight
      gain = fma(splat(b.spread), fma(w * delta, splat(2.0f / 3.0f), 2.0f * (load(s.reach + i) + worth)), gain);
      d_mid = fma(splat(2.0f * b.spread) * w, load(s.in_front + i) - at_back, d_mid);
      d_delta = splat(b.spread) * w * w * (1.0f / 3.0f);
      worth = first_lane(worth);
      rest = first_lane(from);
      edge = first_lane(mid);
    }
    const F32 here = scan_affine_down(alpha * gain, 1.0f - alpha, ladder);
    gain = gain - shift_down(here, ladder);
    ladder = first_lane(here);
    const F32 d_tau = load(s.trans + i + 1) * gain;
    if (out.alphas.data) out.alphas.store(i, load(s.trans + i) * gain, n);
    if (out.sigmas.data) out.sigmas.store(i, delta * d_tau, n);
    if (!out.t_starts.data && !out.t_ends.data) continue;
    if (ray.sigmas.data) d_delta = fma(ray.bounded_sigmas(i, n), d_tau, d_delta);
    if (out.t_starts.data) out.t_starts.store(i, fma(splat(0.5f), d_mid, -d_delta), n);
    if (out.t_ends.data) out.t_ends.store(i, fma(splat(0.5f), d_mid, d_delta), n);
  }
  return ladder[0];
}

// The gradient of a background that all rays share, added up in the order of the rays by one thread.
void sum_background(const Composite& p, const float* grad, const float* left, float* out) {
  for (int64_t k = 0; k < p.n_channels; ++k) {
    double total = 0;
    for (int64_t r = 0; r < p.n_rays; ++r)
      total += static_cast<double>(left[r]) * static_cast<double>(grad[r * p.n_channels + k]);
    out[k] = static_cast<float>(total);
  }
}

void backward(const Composite& p, const CompositeGradIn& in, const CompositeGradOut& out) {
  const int64_t width = p.n_channels;
  with_dtype(p.features.dtype, [&](auto t) {
    using T = decltype(t);
    for_each_ray(p, [&](const Ray& ray, const Scratch& s) {
      const March m = march(p, ray, s);
      const float* g = in.features ? in.features + ray.index * width : nullptr;
      const RowOut features = ray.out(out.features, p.features.dtype, width);
      write_dots(p, ray, s, m.live, g, static_cast<T*>(features.data));
      features.clear(m.live * width, ray.count * width);
      const Behind b = behind(p, ray, m, in);
      if (b.spread != 0.0f) spread(ray, s, m.live);
      const SampleGrads grads{ray.out(out.sigmas, p.sigmas.dtype), ray.out(out.alphas, p.alphas.dtype),
                              ray.out(out.t_starts, p.t_starts.dtype), ray.out(out.t_ends, p.t_ends.dtype)};
      const float first = far_to_near(ray, s, m.live, b, grads);
      grads.clear(m.live, ray.count);
      if (out.prefix_trans) out.prefix_trans[ray.index] = first;
      out.left[ray.index] = m.trans;
      if (out.background && p.background_step)
        for (int64_t k = 0; k < width; ++k) out.background[ray.index * width + k] = g ? m.trans * g[k] : 0.0f;
    });
  });
  if (out.background && !p.background_step && in.features) sum_background(p, in.features, out.left, out.background);
}

}  // namespace

const CompositeKernels composite = {forward, backward};

}  // namespace onepass::ONEPASS_ISA
