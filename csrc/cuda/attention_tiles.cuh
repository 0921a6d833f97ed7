// Attention of many queries in 16-bit types on tensor cores: 64 query rows a block, 16 a warp, keys in tiles that are
// copied one ahead. Bytes: a block reads the keys and values of its row once, most of it from the L2 cache. FLOPs: 4 D
// a query row and key that is not skipped, causal half; with 128 channels a key tile costs a warp 2 * 64 mma of 4096
// multiply-adds, and softmax runs on the same threads between them. Not run on a GPU: times are predicted in
// docs/performance.md, nothing is measured.
//
// One online softmax in float32 (Milakov and Gimelshein 2018; Dao et al. 2022) over all keys of a row, counted from its
// first; probabilities are rounded to the element type for the second product, their sum is not. What a query row gives
// depends on no other row: tiles of keys that it does not attend add exact zeros.
#pragma once
#include "attention.cuh"

namespace onepass::cuda {

inline constexpr int TILE_ROWS = 64;  // query rows of a block
inline constexpr int FEW_ROWS = 64;   // rows of the batch with no more are attend's, which splits their keys
inline constexpr int MMA_ROWS = 16;   // of a warp

// Keys of a tile, so that two tiles of keys and of values fit beside the queries on every architecture.
template <int CHANNELS>
inline constexpr int TILE_KEYS = CHANNELS > 128 ? 16 : 64;
// A row in shared memory: the 16 bytes more keep the rows that ldmatrix reads together in different banks.
template <int CHANNELS>
inline constexpr int TILE_STRIDE = CHANNELS + 8;
template <int CHANNELS>
inline constexpr int TILE_SHARED = 2 * TILE_STRIDE<CHANNELS> * (TILE_ROWS + 4 * TILE_KEYS<CHANNELS>);

__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                    const __nv_bfloat16*) {
  mma_bf16(d, a, b0, b1);
}
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const __half*) {
  mma_f16(d, a, b0, b1);
}

// Of the four lanes that hold a row of a fragment.
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 1));
  return fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(ALL_LANES, x, 1);
  return x + __shfl_xor_sync(ALL_LANES, x, 2);
}

// A query row as its four lanes see it: keys [low, high) may be attended.
struct TileRow {
  bool real;
  QueryRow at;
  int low, high;
  float most, sum;
};

__device__ __forceinline__ TileRow tile_row(const Attention& p, const BatchRow& b, int64_t head, int64_t row) {
  const int64_t group = p.heads / p.kv_heads;
  const QueryRow at{row / group, head * group + row % group};
  const int64_t diagonal = b.total - b.count + at.query;
  int64_t low = b.first, high = b.end;
  if (p.window_left >= 0 && diagonal - p.window_left > low) low = diagonal - p.window_left;
  if (p.window_right >= 0 && diagonal + p.window_right + 1 < high) high = diagonal + p.window_right + 1;
  const bool real = row < b.count * group;
  if (!real || high < low) high = low;
  return {real, at, static_cast<int>(low), static_cast<int>(high), -INFINITY, 0.0f};
}

// The row's place in the results takes its values, which lie in registers [2 * half] and [2 * half + 1] of each part.
template <class T, int PARTS>
__device__ __forceinline__ void put_row(const Attention& p, const BatchRow& b, const TileRow& r, int half,
                                        const float (&values)[PARTS][4]) {
  const float sink = p.sinks ? p.sinks[r.at.head] : -INFINITY, top = fmaxf(r.most, sink);
  const float mine = top == -INFINITY ? 0.0f : expf(r.most - top);
  const float sum = top == -INFINITY ? r.sum : r.sum * mine + expf(sink - top);
  const bool empty = sum == 0.0f;
  const int lane = static_cast<int>(threadIdx.x) % WARP;
  if (!r.real) return;
  if (lane % 4 == 0) p.lse[lse_index(p, b, r.at)] = empty ? -INFINITY : top + logf(sum);
  const int64_t place =
      p.cache.cu_seqlens ? (b.token + r.at.query) * p.out.step : b.index * p.out.batch + r.at.query * p.out.step;
  T* out = static_cast<T*>(const_cast<void*>(p.out.data)) + place + r.at.head * p.out.head;
#pragma unroll
  for (int n = 0; n < PARTS; ++n)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int d = 8 * n + lane % 4 * 2 + e;
      if (d < p.value_dim) out[d] = narrow<T>(empty ? 0.0f : values[n][2 * half + e] * mine / sum);
    }
}

template <class T, int CHANNELS>
__global__ void __launch_bounds__(SHORT_BLOCK, 2) attend_tiles(Attention p, Plan plan, int64_t row_tiles) {
  constexpr int N_KEYS = TILE_KEYS<CHANNELS>, STRIDE = TILE_STRIDE<CHANNELS>;
  __shared__ bool there[2][N_KEYS];
  const int thread = static_cast<int>(threadIdx.x), warp = thread / WARP, lane = thread % WARP;
  // The last tiles, which have most keys where the mask is causal, begin first.
  const int64_t tile = row_tiles - 1 - blockIdx.x % row_tiles, head = blockIdx.x / row_tiles % p.kv_heads;
  const BatchRow b = batch_row(p.cache, blockIdx.x / row_tiles / p.kv_heads, p.queries, p.tokens);
  const int64_t group = p.heads / p.kv_heads, rows = b.count * group, begin = tile * TILE_ROWS;
  if (rows <= FEW_ROWS || begin >= rows) return;
  const int64_t end = begin + TILE_ROWS < rows ? begin + TILE_ROWS : rows;

  T* queries = reinterpret_cast<T*>(dynamic_shared());
  T* keys = queries + TILE_ROWS * STRIDE;
  T* values = keys + 2 * N_KEYS * STRIDE;
  for (int i = thread; i < (TILE_ROWS + 4 * N_KEYS) * STRIDE / PACK<T>; i += SHORT_BLOCK)  // channels that nobody has
    reinterpret_cast<uint4*>(queries)[i] = make_uint4(0, 0, 0, 0);
  __syncthreads();
  for (int i = thread; i < TILE_ROWS * CHANNELS; i += SHORT_BLOCK) {
    const int64_t row = begin + i / CHANNELS, d = i % CHANNELS;
    if (row >= end || d >= p.head_dim) continue;
    const QueryRow at{row / group, head * group + row % group};
    const int64_t place =
        p.cache.cu_seqlens ? (b.token + at.query) * p.q.step : b.index * p.q.batch + at.query * p.q.step;
    const float x = turned(p.rotary, static_cast<const T*>(p.q.data) + place + at.head * p.q.head, d,
                           b.before + (p.rotary_ordered ? at.query : 0));
    queries[i / CHANNELS * STRIDE + d] = narrow<T>(x);
  }

  TileRow mine[2] = {tile_row(p, b, head, begin + warp * MMA_ROWS + lane / 4),
                     tile_row(p, b, head, begin + warp * MMA_ROWS + lane / 4 + 8)};
  // The keys that any row here may attend to, in tiles that are counted from the first key.
  const TileRow first = tile_row(p, b, head, begin), last = tile_row(p, b, head, end - 1);
  const int origin = static_cast<int>(b.first), stop = last.high;
  const int start = origin + (first.low - origin) / N_KEYS * N_KEYS;
  const bool plain = p.softcap <= 0 && !p.slopes && p.mask.kind == MaskKind::none && !p.tree;
  const bool looked_up = p.cache.block_table || p.cache.batch_idx;

  const auto prefetch = [&](int64_t key, int stage) {
    fetch(p, b, p.k, head, p.head_dim, key, keys + stage * N_KEYS * STRIDE, STRIDE, plan.wide_k, N_KEYS);
    fetch(p, b, p.v, head, p.value_dim, key, values + stage * N_KEYS * STRIDE, STRIDE, plan.wide_v, N_KEYS);
    int64_t page, slot;
    if (looked_up && thread < N_KEYS)
      there[stage][thread] = key + thread < b.end && slot_of(p.cache, b.index, key + thread, page, slot);
    commit_copies();
  };

  float out[CHANNELS / 8][4] = {};
  int stage = 0;
  if (start < stop) prefetch(start, 0);
  for (int key = start; key < stop; key += N_KEYS) {
    if (key + N_KEYS < stop) {
      prefetch(key + N_KEYS, stage ^ 1);
      wait_copies<1>();
    } else {
      wait_copies<0>();
    }
    __syncthreads();
    const T *k = keys + stage * N_KEYS * STRIDE, *v = values + stage * N_KEYS * STRIDE;

    float scores[N_KEYS / 8][4] = {};
#pragma unroll
    for (int d = 0; d < CHANNELS; d += 16) {
      uint32_t a[4];
      load_matrices(a, queries + (warp * MMA_ROWS + lane % 16) * STRIDE + d + lane / 16 * 8);
#pragma unroll
      for (int n = 0; n < N_KEYS; n += 16) {
        uint32_t both[4];  // of 16 keys
        load_matrices(both, k + (n + lane % 8 + lane / 16 * 8) * STRIDE + d + lane / 8 % 2 * 8);
        mma(scores[n / 8], a, both[0], both[1], k);
        mma(scores[n / 8 + 1], a, both[2], both[3], k);
      }
    }

#pragma unroll
    for (int half = 0; half < 2; ++half) {
      TileRow& r = mine[half];
      const bool whole = plain && !looked_up && key >= r.low && key + N_KEYS <= r.high;
      float top = -INFINITY;
#pragma unroll
      for (int n = 0; n < N_KEYS / 8; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& s = scores[n][2 * half + e];
          const int column = 8 * n + lane % 4 * 2 + e;
          const int at = key + column;
          const bool seen = whole || (at >= r.low && at < r.high && (!looked_up || there[stage][column]));
          s = !seen ? -INFINITY : plain ? s * p.scale : score_of(p, b, r.at, at, s);
          top = fmaxf(top, s);
        }
      top = fmaxf(r.most, quad_max(top));
      const float shift = top == -INFINITY ? 0.0f : top, fade = expf(r.most - shift);
      float sum = 0;
#pragma unroll
      for (int n = 0; n < N_KEYS / 8; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& s = scores[n][2 * half + e];
          s = expf(s - shift);
          sum += s;
        }
      r.sum = r.sum * fade + sum;  // of this lane's columns; joined at the end
      r.most = top;
#pragma unroll
      for (int n = 0; n < CHANNELS / 8; ++n) out[n][2 * half] *= fade, out[n][2 * half + 1] *= fade;
    }

#pragma unroll
    for (int j = 0; j < N_KEYS; j += 16) {
      // What the first product left in registers is the left operand of the second.
      const float *low = scores[j / 8], *high = scores[j / 8 + 1];
      const uint32_t a[4] = {pair(low[0], low[1], v), pair(low[2], low[3], v), pair(high[0], high[1], v),
                             pair(high[2], high[3], v)};
#pragma unroll
      for (int d = 0; d < CHANNELS; d += 16) {
        uint32_t both[4];  // of 16 channels
        load_matrices_transposed(both, v + (j + lane % 8 + lane / 8 % 2 * 8) * STRIDE + d + lane / 16 * 8);
        mma(out[d / 8], a, both[0], both[1], v);
        mma(out[d / 8 + 1], a, both[2], both[3], v);
      }
    }
    __syncthreads();
    stage ^= 1;
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    mine[half].sum = quad_sum(mine[half].sum);
    put_row<T>(p, b, mine[half], half, out);
  }
}

}  // namespace onepass::cuda
