// Reparameterized sampling in one pass. Bytes: forward reads mean and logvar and writes z (12 an element in float32),
// backward reads grad_z, mean and logvar and writes two gradients (20); the noise is drawn in registers, twice.
#pragma once
#include "onepass/reparam.h"
#include "random.cuh"

namespace onepass::cuda {

__device__ __forceinline__ NoiseAt noise_at(const Reparam& p, const Tile& tile) {
  if (p.noise.data) return {{}, 0, 0};
  return noise_from(p.keys.at(p.keys_per_row ? tile.row : 0), (p.keys_per_row ? 0 : tile.row * p.length) + tile.begin);
}

// Noise of elements i .. of the tile, drawn or given.
template <class T>
__device__ __forceinline__ void noise_of(const Reparam& p, const NoiseAt& at, const T* given, int64_t i, int64_t count,
                                         float (&eps)[PACK<T>]) {
  if (p.noise.data)
    load(given, i, count, eps);
  else
    normals_at(at.key, at.first + i + at.skip, eps);
}

template <class T, int THREADS>
__global__ void __launch_bounds__(THREADS == WARP ? SHORT_BLOCK : BLOCK, 2)
    sample(int64_t groups, Reparam p, T* z, float* kl, double* partial) {
  const int64_t index = group_index<THREADS>();
  if (index >= groups) return;
  const Tile tile = tile_at(index, p.length, KL_TILE);
  const int64_t count = tile.end - tile.begin;
  const T *mean = row_of<T>(p.mean, tile), *logvar = row_of<T>(p.logvar, tile), *given = row_of<T>(p.noise, tile);
  T* out = z + tile.row * p.length + tile.begin;
  const NoiseAt at = noise_at(p, tile);
  float total = 0;
  for (int64_t i = place_in_group<THREADS>() * PACK<T> - at.skip; i < count; i += THREADS * PACK<T>) {
    float m[PACK<T>], lv[PACK<T>], eps[PACK<T>];
    load(mean, i, count, m);
    load(logvar, i, count, lv);
    noise_of(p, at, given, i, count, eps);
#pragma unroll
    for (int j = 0; j < PACK<T>; ++j) {
      const float std = expf(0.5f * lv[j]);
      total += fmaf(std, std, fmaf(m[j], m[j], -1.0f - lv[j]));  // 0 for elements outside
      eps[j] = fmaf(std, eps[j], m[j]);
    }
    store(out, i, count, eps);
  }
  if (!kl) return;
  total = group_sum<THREADS>(total);
  if (place_in_group<THREADS>() != 0) return;
  if (partial)
    partial[index] = 0.5 * static_cast<double>(total);
  else
    kl[tile.row] = 0.5f * total;
}

// A row's partial sums in ascending order; a thread a row.
__global__ void __launch_bounds__(BLOCK) add_partials(const double* partial, int64_t rows, int64_t tiles, float* kl) {
  const int64_t row = group_index<1>();
  if (row >= rows) return;
  double total = 0;
  for (int64_t t = 0; t < tiles; ++t) total += partial[row * tiles + t];
  kl[row] = static_cast<float>(total);
}

template <class T, int THREADS>
__global__ void __launch_bounds__(THREADS == WARP ? SHORT_BLOCK : BLOCK, 2)
    sample_backward(int64_t groups, Reparam p, RowsIn grad_z, const float* grad_kl, T* grad_mean, T* grad_logvar,
                    T* grad_noise) {
  const int64_t index = group_index<THREADS>();
  if (index >= groups) return;
  const Tile tile = tile_at(index, p.length, KL_TILE);
  const int64_t count = tile.end - tile.begin, first = tile.row * p.length + tile.begin;
  const T *mean = row_of<T>(p.mean, tile), *logvar = row_of<T>(p.logvar, tile), *given = row_of<T>(p.noise, tile);
  const T* dz = row_of<T>(grad_z, tile);
  const float dkl = grad_kl ? grad_kl[tile.row] : 0.0f;
  const NoiseAt at = noise_at(p, tile);
  for (int64_t i = place_in_group<THREADS>() * PACK<T> - at.skip; i < count; i += THREADS * PACK<T>) {
    float std[PACK<T>], dm[PACK<T>] = {}, dlv[PACK<T>] = {};
    load(logvar, i, count, std);
#pragma unroll
    for (int j = 0; j < PACK<T>; ++j) std[j] = expf(0.5f * std[j]);
    if (grad_z.data) {
      float eps[PACK<T>];
      noise_of(p, at, given, i, count, eps);
      load(dz, i, count, dm);
#pragma unroll
      for (int j = 0; j < PACK<T>; ++j) {
        const float scaled = dm[j] * std[j];
        dlv[j] = 0.5f * scaled * eps[j];
        eps[j] = scaled;
      }
      if (grad_noise) store(grad_noise + first, i, count, eps);
    }
    if (grad_kl) {
      float m[PACK<T>];
      load(mean, i, count, m);
#pragma unroll
      for (int j = 0; j < PACK<T>; ++j) {
        dm[j] = fmaf(dkl, m[j], dm[j]);
        dlv[j] = fmaf(0.5f * dkl, fmaf(std[j], std[j], -1.0f), dlv[j]);
      }
    }
    store(grad_mean + first, i, count, dm);
    store(grad_logvar + first, i, count, dlv);
  }
}

}  // namespace onepass::cuda
