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

#include "lanes.h"
#include "range.h"

namespace onepass::ONEPASS_ISA {
namespace {

constexpr float OPACITY_FLOOR = 0x1p-23f;
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
  F32 carry = splat(p.prefix_trans ? p.prefix_trans[ray.index] : 1.0f), opacity{}, depth{};
  const F32 eps = splat(p.early_stop_eps);
  const bool given = p.alphas.data != nullptr;
  int64_t live = ray.count;
  s.trans[0] = carry[0];
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
    const F32 after = carry * scan_product(keep), before = shift_up(after, carry);
    F32 mid = 0.5f * (start + end);
    const uint32_t dead = ~lane_bits(before >= eps) & ((1u << n) - 1u);
    const int stop = dead ? __builtin_ctz(dead) : W;
    const I32 lit = lanes() < stop;
    if (dead) {
      live = i + stop;
      alpha = lit ? alpha : F32{};
      mid = lit ? mid : F32{};
      carry = splat(before[stop]);
    }
    const F32 weight = dead ? (lit ? before * alpha : F32{}) : before * alpha;
    opacity += weight;
    depth = fma(weight, mid, depth);
    store(s.weights + i, weight);
    store(s.alphas + i, alpha);
    store(s.trans + i + 1, after);
    if (dead) break;
    carry = last_lane(after);
  }
  return {live, carry[0], sum(opacity), sum(depth)};
}

// E_i = sum_{j<i} w_j (m_i - m_j) and the weight in front of every sample, for the distortion, which is returned.
float spread(const Ray& ray, const Scratch& s, int64_t live) {
  F32 front{}, reach{}, edge{}, total{};
  for (int64_t i = 0; i < live; i += W) {
    const int n = lanes_left(i, live);
    const F32 w = load(s.weights + i), mid = ray.mids(i, n), delta = ray.deltas(i, n);
    if (i == 0) edge = first_lane(mid);
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

// ---- channels: 1 to 4 of them as they lie, more in blocks of up to BLOCK, a sample at a time ----

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

void forward(const Composite& p, const CompositeOut& out) {
  const DType density = p.sigmas.data ? p.sigmas.dtype : p.alphas.dtype, time = p.t_starts.dtype;
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
      // Lanes beyond the ray hold no weight, so the gap to them does not count.
      const F32 step = at_back * (shift_down(mid, edge) - mid);
      worth = worth + scan_sum_down(n < W ? (lanes() < n - 1 ? step : F32{}) : step);
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
