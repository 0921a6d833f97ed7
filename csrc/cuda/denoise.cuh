// A denoising step in one pass. Bytes: sample, model output and result (12 an element in float32), 4 more with guidance
// or given noise and 8 with history; drawn noise stays in registers. An operand whose coefficient is 0 is not read.
#pragma once
#include "onepass/denoise.h"
#include "random.cuh"

namespace onepass::cuda {

inline constexpr int64_t STEP_TILE = 2048;

// A row of the table in float32, and what the batch's row needs beside it.
struct Coefficients {
  bool known;  // the step is a row of the table
  float x, m, u, z, p, q, limit, guidance;
  int slot;   // of the history that takes u, or -1
  int terms;  // slots whose coefficient is not 0
  int slots[MAX_HISTORY];
  float history[MAX_HISTORY];
  Key key;
};

__device__ __forceinline__ void read_row(const Denoise& p, int64_t row, Coefficients& c) {
  const int64_t step = static_cast<int64_t>(p.step.at(row));
  c.known = step >= 0 && step < p.table.rows;
  if (!c.known) return;
  const double* from = p.table.data + step * (COL_HISTORY + p.table.slots);
  c.x = static_cast<float>(from[COL_X]);
  c.m = static_cast<float>(from[COL_M]);
  c.u = static_cast<float>(from[COL_U]);
  c.z = static_cast<float>(from[COL_Z]);
  c.p = static_cast<float>(from[COL_P]);
  c.q = static_cast<float>(from[COL_Q]);
  c.limit = static_cast<float>(from[COL_LIMIT]);
  c.guidance = p.guidance.at(row);
  c.slot = static_cast<int>(from[COL_SLOT]);
  c.terms = 0;
  for (int j = 0; j < static_cast<int>(p.table.slots) && j < MAX_HISTORY; ++j) {
    if (from[COL_HISTORY + j] == 0) continue;
    c.slots[c.terms] = j;
    c.history[c.terms++] = static_cast<float>(from[COL_HISTORY + j]);
  }
  c.key = {p.seed.at(p.keys_per_row ? row : 0), DENOISE_STREAM + static_cast<uint64_t>(from[COL_NUMBER]), 0};
}

// The model's output, guidance folded in; of two outputs only those that count are read.
template <int N, class M>
__device__ __forceinline__ void model_at(const Denoise& p, const Tile& tile, float g, int64_t i, int64_t count,
                                         float (&m)[N]) {
  const M *uncond = row_of<M>(p.model, tile), *cond = row_of<M>(p.cond, tile);
  if (!p.cond.data || g == 0) return load(uncond, i, count, m);
  load(cond, i, count, m);
  if (g == 1) return;
  float u[N];
  load(uncond, i, count, u);
#pragma unroll
  for (int j = 0; j < N; ++j) m[j] = fmaf(g, m[j] - u[j], u[j]);
}

// `known` where the mask is 0, `prev` where it is 1, a mixture between.
template <int N, class T>
__device__ __forceinline__ void blend(const Denoise& p, const Tile& tile, int64_t i, int64_t count, float (&prev)[N]) {
  float known[N];
  load(row_of<T>(p.known, tile), i, count, known);
  const int64_t row = tile.row * p.mask.step;
  int64_t at = (tile.begin + (i < 0 ? 0 : i)) % p.mask.period;
#pragma unroll
  for (int j = 0; j < N; ++j) {
    if (i + j < 0 || i + j >= count) continue;
    const float weight = p.mask.is_float ? static_cast<const float*>(p.mask.data)[row + at]
                                         : static_cast<float>(static_cast<const uint8_t*>(p.mask.data)[row + at] != 0);
    const float mixed = fmaf(weight, prev[j] - known[j], known[j]);
    prev[j] = weight == 0.0f ? known[j] : (weight == 1.0f ? prev[j] : mixed);
    at = at + 1 == p.mask.period ? 0 : at + 1;
  }
}

template <int N>
__device__ __forceinline__ void add_term(float coefficient, const float (&operand)[N], float (&sum)[N]) {
#pragma unroll
  for (int j = 0; j < N; ++j) sum[j] = fmaf(coefficient, operand[j], sum[j]);
}

template <class T, class M, int THREADS>
__global__ void __launch_bounds__(THREADS == WARP ? SHORT_BLOCK : BLOCK, 2) step(int64_t groups, Denoise p) {
  constexpr int N = PACK<M>;  // M is T or the narrower one
  __shared__ Coefficients rows[THREADS == WARP ? SHORT_BLOCK / WARP : 1];
  const int64_t index = group_index<THREADS>();
  if (index >= groups) return;
  const Tile tile = tile_at(index, p.length, STEP_TILE);
  Coefficients& c = rows[THREADS == WARP ? threadIdx.x / WARP : 0];
  if (place_in_group<THREADS>() == 0) read_row(p, tile.row, c);
  sync_group<THREADS>();
  if (!c.known) return;

  const int64_t count = tile.end - tile.begin;
  const bool u_counts = c.u != 0 || c.slot >= 0, draws = c.z != 0 && !p.noise.data;
  const bool reads_x = c.x != 0 || (u_counts && c.p != 0), reads_m = c.m != 0 || (u_counts && c.q != 0);
  // With one key for the whole batch a row may begin inside a block of four.
  const int64_t start = (p.keys_per_row ? 0 : tile.row * p.length) + tile.begin;
  const int skip = draws ? static_cast<int>(start % 4) : 0;
  T* state = static_cast<T*>(p.state) + tile.row * p.table.slots * p.length + tile.begin;
  T* out = static_cast<T*>(p.out.data) + tile.row * p.out.step + tile.begin;

  for (int64_t i = place_in_group<THREADS>() * N - skip; i < count; i += THREADS * N) {
    float x[N] = {}, m[N] = {}, prev[N] = {};
    if (reads_x) load(row_of<T>(p.sample, tile), i, count, x);
    if (reads_m) model_at<N, M>(p, tile, c.guidance, i, count, m);
    if (c.x != 0) add_term(c.x, x, prev);
    if (c.m != 0) add_term(c.m, m, prev);
    if (u_counts) {
      float u[N] = {};
      if (c.p != 0) add_term(c.p, x, u);
      if (c.q != 0) add_term(c.q, m, u);
#pragma unroll
      for (int j = 0; j < N; ++j) u[j] = u[j] < -c.limit ? -c.limit : (u[j] > c.limit ? c.limit : u[j]);  // keeps NaN
      if (c.u != 0) add_term(c.u, u, prev);
#pragma unroll
      for (int j = 0; j < N; ++j) m[j] = u[j];
    }
    if (c.z != 0) {
      float z[N];
      if (draws)
        normals_at(c.key, start + i, z);
      else
        load(row_of<T>(p.noise, tile), i, count, z);
      add_term(c.z, z, prev);
    }
    for (int k = 0; k < c.terms; ++k) {
      float old[N];
      load(state + c.slots[k] * p.length, i, count, old);
      add_term(c.history[k], old, prev);
    }
    if (c.slot >= 0) store(state + c.slot * p.length, i, count, m);
    if (p.mask.data) blend<N, T>(p, tile, i, count, prev);
    store(out, i, count, prev);
  }
}

}  // namespace onepass::cuda
