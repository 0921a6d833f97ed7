// Posterior samples in one pass, whatever is asked beside them. Bytes: forward reads mean and logvar and writes every
// sample; backward reads them and the samples' gradients and writes two gradients. Chunks in an inner dim are read and
// written where they lie; noise is drawn in registers, that of an antithetic pair once.
#pragma once
#include "onepass/latent.h"
#include "random.cuh"

namespace onepass::cuda {

inline constexpr double LN_2PI = 1.8378770664093453;

// A thread takes as many elements as a block of random numbers has, once a tile: so the rows of a small batch fill a
// device, and the sums over samples stay in registers.
inline constexpr int UNIT = NUMBERS;
static_assert(BLOCK * UNIT == LATENT_TILE);

// Where an element lies in its row.
struct Spot {
  int64_t segment, inside;
};

__device__ __forceinline__ Spot spot_at(const Latent& p, int64_t element) {
  if (p.segments == 1 || element < 0) return {0, element};
  const int64_t segment = element / p.run;
  return {segment, element - segment * p.run};
}

// Elements i .. i + UNIT - 1 of a tile of `count`, the first of them at `spot`; zeros for those outside.
template <class T>
__device__ __forceinline__ void load(const Latent& p, const Segments& x, int64_t row, const Spot& spot, int64_t i,
                                     int64_t count, float (&to)[UNIT], const T*, int64_t ahead = 0) {
  const T* from = static_cast<const T*>(x.data) + ahead + row * x.row + spot.segment * x.segment;
  if (spot.inside + UNIT <= p.run) return load(from + (spot.inside - i), i, count, to);
  int64_t inside = spot.inside;
#pragma unroll
  for (int j = 0; j < UNIT; ++j) {
    to[j] = i + j >= 0 && i + j < count ? widen(from[inside]) : 0.0f;
    if (++inside < p.run) continue;
    inside = 0;
    from += x.segment;
  }
}

// The same elements, those inside alone.
template <class T>
__device__ __forceinline__ void store(const Latent& p, const SegmentsOut& x, int64_t row, const Spot& spot, int64_t i,
                                      int64_t count, const float (&from)[UNIT]) {
  T* to = static_cast<T*>(x.data) + row * x.row + spot.segment * x.segment;
  if (spot.inside + UNIT <= p.run) return store(to + (spot.inside - i), i, count, from);
  int64_t inside = spot.inside;
#pragma unroll
  for (int j = 0; j < UNIT; ++j) {
    if (i + j >= 0 && i + j < count) to[inside] = narrow<T>(from[j]);
    if (++inside < p.run) continue;
    inside = 0;
    to += x.segment;
  }
}

__device__ __forceinline__ NoiseAt noise_at(const Latent& p, const Tile& tile) {
  if (p.noise.data) return {{}, 0, 0};
  return noise_from(p.keys.at(p.keys_per_row ? tile.row : 0),
                    (p.keys_per_row ? 0 : tile.row * p.length()) + tile.begin);
}

// Noise of elements i .. of the tile in one of the draws, drawn or given.
template <class T>
__device__ __forceinline__ void noise_of(const Latent& p, const NoiseAt& at, int64_t row, const Spot& spot, int64_t i,
                                         int64_t count, int64_t draw, float (&eps)[UNIT]) {
  if (p.noise.data)
    return load(p, p.noise, row, spot, i, count, eps, static_cast<const T*>(nullptr), draw * p.noise_draw);
  Key key = at.key;
  key.offset += static_cast<uint64_t>(draw) * LATENT_DRAW;
  normals_at(key, at.first + i + at.skip, eps);
}

// What an element has. away = mean - prior's, ratio = exp(logvar - prior's).
template <bool PRIOR>
struct Element {
  float mean, logvar, std, away, precision, prior_logvar, ratio;
  bool free;  // logvar is inside its clamp

  __device__ float kl() const {
    if constexpr (PRIOR)
      return 0.5f * fmaf(away * away, precision, (ratio - 1.0f) + (prior_logvar - logvar));
    else
      return 0.5f * fmaf(std, std, fmaf(mean, mean, -1.0f - logvar));
  }
};

template <class T, bool PRIOR>
__device__ __forceinline__ void elements_at(const Latent& p, int64_t row, const Spot& spot, int64_t i, int64_t count,
                                            Element<PRIOR> (&e)[UNIT]) {
  constexpr const T* type = nullptr;
  float mean[UNIT], logvar[UNIT], prior_mean[UNIT] = {}, prior_logvar[UNIT] = {};
  load(p, p.mean, row, spot, i, count, mean, type);
  load(p, p.logvar, row, spot, i, count, logvar, type);
  if constexpr (PRIOR) {
    load(p, p.prior_mean, row, spot, i, count, prior_mean, type);
    load(p, p.prior_logvar, row, spot, i, count, prior_logvar, type);
  }
#pragma unroll
  for (int j = 0; j < UNIT; ++j) {
    const float raw = logvar[j], low = p.clamp_low, high = p.clamp_high;
    e[j].mean = mean[j];
    e[j].free = raw >= low && raw <= high;
    e[j].logvar = raw < low ? low : (raw > high ? high : raw);  // keeps NaN
    e[j].std = expf(0.5f * e[j].logvar);
    e[j].prior_logvar = prior_logvar[j];
    e[j].away = mean[j] - prior_mean[j];
    e[j].precision = PRIOR ? expf(-prior_logvar[j]) : 1.0f;
    e[j].ratio = PRIOR ? expf(e[j].logvar - prior_logvar[j]) : e[j].std * e[j].std;
  }
}

// What a row's sum stands for: its KL, or a log density.
__device__ __forceinline__ float finished(const Latent& p, double sum) {
  return static_cast<float>(p.terms == LatentTerms::row ? p.beta * sum
                                                        : -0.5 * (sum + static_cast<double>(p.length()) * LN_2PI));
}

// A group's sum: the row's where a tile holds it whole, else one of the partial sums of that plane of rows.
template <int THREADS>
__device__ __forceinline__ void put_sum(const Latent& p, float sum, const Tile& tile, double* partial, int64_t plane,
                                        float* result) {
  sum = group_sum<THREADS>(sum);
  if (place_in_group<THREADS>() != 0) return;
  if (partial)
    partial[(plane * p.rows + tile.row) * ((p.length() + LATENT_TILE - 1) / LATENT_TILE) + tile.begin / LATENT_TILE] =
        sum;
  else
    *result = finished(p, sum);
}

template <class T, bool PRIOR, int THREADS>
__global__ void __launch_bounds__(THREADS == WARP ? SHORT_BLOCK : BLOCK, 2)
    posterior(int64_t groups, Latent p, LatentOut out) {
  const int64_t index = group_index<THREADS>();
  if (index >= groups) return;
  const int64_t length = p.length();
  const Tile tile = tile_at(index, length, LATENT_TILE);
  const int64_t count = tile.end - tile.begin;
  const NoiseAt at = noise_at(p, tile);
  const bool weighted = p.terms == LatentTerms::weights;
  const int64_t sides = p.antithetic ? 2 : 1;
  for (int64_t draw = 0; draw < p.samples / sides; ++draw) {
    float kl = 0, first[2] = {}, second[2] = {};
    for (int64_t i = place_in_group<THREADS>() * UNIT - at.skip; i < count; i += THREADS * UNIT) {
      const Spot spot = spot_at(p, tile.begin + i);
      Element<PRIOR> e[UNIT];
      float eps[UNIT];
      elements_at<T>(p, tile.row, spot, i, count, e);
      noise_of<T>(p, at, tile.row, spot, i, count, draw, eps);
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        if (side == sides) break;
        float z[UNIT];
#pragma unroll
        for (int j = 0; j < UNIT; ++j) {
          if (side) eps[j] = -eps[j];
          z[j] = fmaf(e[j].std, eps[j], e[j].mean);
          if (!weighted || i + j < 0 || i + j >= count) continue;
          const float from = fmaf(e[j].std, eps[j], e[j].away);
          first[side] += fmaf(eps[j], eps[j], e[j].logvar);
          second[side] += fmaf(from * from, e[j].precision, e[j].prior_logvar);
        }
        store(static_cast<T*>(out.z) + ((draw * sides + side) * p.rows + tile.row) * length + tile.begin, i, count, z);
      }
      if (draw || weighted || p.terms == LatentTerms::none) continue;
      float own[UNIT];
#pragma unroll
      for (int j = 0; j < UNIT; ++j) {
        const float bare = e[j].kl(), held = bare < p.free_bits ? p.free_bits : bare;  // keeps NaN
        own[j] = p.beta * held;
        if (i + j >= 0 && i + j < count) kl += held;
      }
      if (p.terms == LatentTerms::element) store(out.first + tile.row * length + tile.begin, i, count, own);
    }
    if (p.terms == LatentTerms::row && draw == 0) put_sum<THREADS>(p, kl, tile, out.partial, 0, out.first + tile.row);
    if (!weighted) continue;
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      if (side == sides) break;
      const int64_t sample = draw * sides + side, result = sample * p.rows + tile.row;
      put_sum<THREADS>(p, first[side], tile, out.partial, sample, out.first + result);
      put_sum<THREADS>(p, second[side], tile, out.partial, p.samples + sample, out.second + result);
    }
  }
}

// The sums of all rows of all planes: a warp each, its lanes' sums in ascending order and then joined.
__global__ void __launch_bounds__(BLOCK) sum_tiles(Latent p, LatentOut out, int64_t planes, int64_t tiles) {
  const int64_t sum = group_index<WARP>(), plane = sum / p.rows;
  if (plane >= planes) return;
  double total = 0;
  for (int64_t i = place_in_group<WARP>(); i < tiles; i += WARP) total += out.partial[sum * tiles + i];
  total = warp_sum(total);
  if (place_in_group<WARP>() != 0) return;
  const bool of_second = p.terms == LatentTerms::weights && plane >= p.samples;
  (of_second ? out.second + (sum - p.samples * p.rows) : out.first + sum)[0] = finished(p, total);
}

// Gradients of a unit: of mean and the prior, of logvar but for the sum over samples of dz eps.
struct Gradients {
  float mean[UNIT] = {}, logvar[UNIT] = {}, prior_mean[UNIT] = {}, prior_logvar[UNIT] = {}, dz_eps[UNIT] = {};
};

// What the KL's gradient adds; first, so that little of an element is kept while samples are summed.
template <bool PRIOR>
__device__ __forceinline__ void add_kl(const Latent& p, const LatentGradIn& in, const Tile& tile, int64_t i,
                                       const Element<PRIOR> (&e)[UNIT], Gradients& to) {
  float dkl[UNIT];
  if (p.terms == LatentTerms::element)
    load(in.first + tile.row * p.length() + tile.begin, i, tile.end - tile.begin, dkl);
#pragma unroll
  for (int j = 0; j < UNIT; ++j) {
    if (p.terms == LatentTerms::row) dkl[j] = in.first[tile.row];
    const float on = e[j].kl() >= p.free_bits ? p.beta * dkl[j] : 0.0f, slope = on * e[j].away * e[j].precision;
    to.mean[j] = slope;
    to.prior_mean[j] = -slope;
    to.logvar[j] = 0.5f * on * (e[j].ratio - 1.0f);
    to.prior_logvar[j] = 0.5f * on * (1.0f - e[j].ratio - e[j].away * e[j].away * e[j].precision);
  }
}

template <class T, bool PRIOR>
__device__ __forceinline__ void sum_samples(const Latent& p, const LatentGradIn& in, T* grad_noise, const NoiseAt& at,
                                            const Tile& tile, const Spot& spot, int64_t i,
                                            const Element<PRIOR> (&e)[UNIT], Gradients& to) {
  const int64_t length = p.length(), count = tile.end - tile.begin, sides = p.antithetic ? 2 : 1;
  const bool weighted = p.terms == LatentTerms::weights;
  for (int64_t draw = 0; draw < p.samples / sides; ++draw) {
    float eps[UNIT], deps[UNIT] = {};
    noise_of<T>(p, at, tile.row, spot, i, count, draw, eps);
    for (int64_t side = 0; side < sides; ++side) {
      const int64_t sample = draw * sides + side;
      const float on_first = weighted && in.first ? in.first[sample * p.rows + tile.row] : 0.0f;
      const float on_second = weighted && in.second ? in.second[sample * p.rows + tile.row] : 0.0f;
      const float sign = side ? -1.0f : 1.0f;
      float dz[UNIT] = {};
      if (in.z.data) load(p, in.z, tile.row, spot, i, count, dz, static_cast<const T*>(nullptr), sample * in.z_sample);
#pragma unroll
      for (int j = 0; j < UNIT; ++j) {
        const float own = sign * eps[j];
        if (weighted && in.second) {
          const float from = fmaf(e[j].std, own, e[j].away), pull = on_second * from * e[j].precision;
          dz[j] -= pull;
          to.prior_mean[j] += pull;
          to.prior_logvar[j] = fmaf(0.5f, fmaf(pull, from, -on_second), to.prior_logvar[j]);
        }
        to.mean[j] += dz[j];
        to.dz_eps[j] = fmaf(dz[j], own, to.dz_eps[j]);
        deps[j] = fmaf(sign, dz[j] * e[j].std, deps[j]);
        if (weighted && in.first) deps[j] = fmaf(-on_first, eps[j], deps[j]);
        to.logvar[j] = fmaf(-0.5f, on_first, to.logvar[j]);
      }
    }
    if (grad_noise) store(grad_noise + (draw * p.rows + tile.row) * length + tile.begin, i, count, deps);
  }
}

// Nothing is summed over threads: a warp a tile, whatever the row.
inline constexpr int64_t BACKWARD_TILE = 2 * WARP * UNIT;

template <class T, bool PRIOR>
__global__ void __launch_bounds__(SHORT_BLOCK, PRIOR ? 3 : 4)
    posterior_backward(int64_t groups, Latent p, LatentGradIn in, LatentGradOut out) {
  const int64_t index = group_index<WARP>();
  if (index >= groups) return;
  const Tile tile = tile_at(index, p.length(), BACKWARD_TILE);
  const int64_t count = tile.end - tile.begin;
  const NoiseAt at = noise_at(p, tile);
  const bool weighted = p.terms == LatentTerms::weights;
  const bool on_kl = in.first && (p.terms == LatentTerms::row || p.terms == LatentTerms::element);
  const bool on_samples = in.z.data || (weighted && (in.first || in.second));
  for (int64_t i = place_in_group<WARP>() * UNIT - at.skip; i < count; i += WARP * UNIT) {
    const Spot spot = spot_at(p, tile.begin + i);
    Element<PRIOR> e[UNIT];
    Gradients to;
    elements_at<T>(p, tile.row, spot, i, count, e);
    if (on_kl) add_kl(p, in, tile, i, e, to);
    if (on_samples) sum_samples<T>(p, in, static_cast<T*>(out.noise), at, tile, spot, i, e, to);
#pragma unroll
    for (int j = 0; j < UNIT; ++j) to.logvar[j] = e[j].free ? fmaf(0.5f * e[j].std, to.dz_eps[j], to.logvar[j]) : 0.0f;
    store<T>(p, out.mean, tile.row, spot, i, count, to.mean);
    store<T>(p, out.logvar, tile.row, spot, i, count, to.logvar);
    if constexpr (PRIOR) {
      if (out.prior_mean.data) store<T>(p, out.prior_mean, tile.row, spot, i, count, to.prior_mean);
      if (out.prior_logvar.data) store<T>(p, out.prior_logvar, tile.row, spot, i, count, to.prior_logvar);
    }
  }
}

}  // namespace onepass::cuda
