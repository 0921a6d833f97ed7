// out = softmax(q k^T) v, over plain keys or a cache. Bytes: each block reads its keys and values once for all the
// query rows that it holds (the queries of a row times the heads that share a key-value head).
//
// The keys of a row of the batch are cut into chunks by their number alone, counted from the first valid one. Each
// chunk is an online softmax of its own and chunks are joined in ascending order, with the same arithmetic whether one
// block walks all of them or every chunk is a block and a second kernel joins them: the split, and with it the batch,
// changes no bit. A query row is one warp's, so it depends on no other row either.
#pragma once
#include <cfloat>
#include <cmath>

#include "device.cuh"
#include "onepass/attention.h"
#include "ptx.cuh"

namespace onepass::cuda {

inline constexpr int KEYS = 32;            // of a tile, one a lane
inline constexpr int ROWS = 4;             // query rows of a warp
inline constexpr int MOST_CHUNKS = 32;     // of a row of the batch
inline constexpr int SMALL_CHUNK = 256;    // keys
inline constexpr int MOST_CHANNELS = 256;  // of a key or a value

ONEPASS_EVERYWHERE inline int64_t chunk_size(int64_t keys) {
  const int64_t even = (keys + MOST_CHUNKS - 1) / MOST_CHUNKS;
  return even <= SMALL_CHUNK ? SMALL_CHUNK : (even + KEYS - 1) / KEYS * KEYS;
}

// A row of the batch: its queries, whose last is key total - 1, and its keys [first, end). What the host could not
// check is made harmless here.
struct BatchRow {
  int64_t index, token, count, first, end, total, before;  // token: of the first query when ragged; before: the append
};

__device__ __forceinline__ BatchRow batch_row(const Cache& c, int64_t index, int64_t queries, int64_t tokens) {
  BatchRow r{index, 0, queries, 0, 0, 0, c.seqlens ? c.seqlens[index] : c.keys};
  if (c.cu_seqlens) {
    r.token = c.cu_seqlens[index];
    r.count = c.cu_seqlens[index + 1] - r.token;
    if (r.token < 0 || r.count < 0 || r.count > queries || r.token + r.count > tokens) r.count = 0;
  }
  const int64_t capacity = c.slots * (c.block_table ? c.blocks : 1);
  r.total = r.before + (c.appended < 0 ? r.count : c.appended);
  r.end = r.total < 0 ? 0 : (r.total < capacity ? r.total : capacity);
  if (c.leftpad) r.first = c.leftpad[index];
  r.first = r.first < 0 ? 0 : (r.first < r.end ? r.first : r.end);
  return r;
}

// Where key `key` of a row is, in steps of Heads; false where there is no such slot.
__device__ __forceinline__ bool slot_of(const Cache& c, int64_t row, int64_t key, int64_t& page, int64_t& slot) {
  page = c.batch_idx ? c.batch_idx[row] : row;
  slot = key;
  if (c.block_table) {
    const int64_t block = key / c.slots;
    if (key < 0 || block >= c.blocks) return false;
    page = c.block_table[row * c.blocks + block];
    slot = key - block * c.slots;
  }
  return page >= 0 && page < c.pages && slot >= 0 && slot < c.slots;
}

// Channel d of x at `position`, turned. The result is what the cache would hold: rounded to T.
template <class T>
__device__ __forceinline__ float turned(const Rotary& r, const T* x, int64_t d, int64_t position) {
  if (!r.cos || d >= 2 * r.half) return widen(x[d]);
  const int64_t i = r.interleaved ? d / 2 : d % r.half, a = r.interleaved ? 2 * i : i,
                b = r.interleaved ? a + 1 : a + r.half;
  position = position < 0 ? 0 : (position < r.positions ? position : r.positions - 1);
  const float c = r.cos[position * r.half + i], s = r.sin[position * r.half + i], u = widen(x[a]), v = widen(x[b]);
  return widen(
      narrow<T>(d == a ? __fsub_rn(__fmul_rn(u, c), __fmul_rn(v, s)) : __fadd_rn(__fmul_rn(v, c), __fmul_rn(u, s))));
}

// An online softmax: the largest score, the sum of exp(score - most), and the values weighted by the same.
template <int BLOCKS>
struct Softmax {
  float most, sum, value[BLOCKS];  // channel lane + 32 i

  __device__ __forceinline__ void clear() {
    most = -INFINITY;
    sum = 0;
#pragma unroll
    for (int i = 0; i < BLOCKS; ++i) value[i] = 0;
  }

  // Joins what later keys gave. Nothing here may be fused in one place and not in another.
  __device__ __forceinline__ void join(float later_most, float later_sum, const float (&later)[BLOCKS]) {
    if (later_most == -INFINITY) return;
    const float top = fmaxf(most, later_most), mine = expf(most - top), theirs = expf(later_most - top);
    most = top;
    sum = __fadd_rn(__fmul_rn(sum, mine), __fmul_rn(later_sum, theirs));
#pragma unroll
    for (int i = 0; i < BLOCKS; ++i) value[i] = __fadd_rn(__fmul_rn(value[i], mine), __fmul_rn(later[i], theirs));
  }
};

// What a row of queries is in the results and in the partial ones.
struct QueryRow {
  int64_t query, head;
};

__device__ __forceinline__ int64_t lse_index(const Attention& p, const BatchRow& b, const QueryRow& r) {
  if (p.cache.cu_seqlens) return r.head * p.tokens + b.token + r.query;
  return (b.index * p.heads + r.head) * p.queries + r.query;
}

template <class T, int BLOCKS>
__device__ __forceinline__ void finish(const Attention& p, const BatchRow& b, const QueryRow& r, Softmax<BLOCKS>& s) {
  if (p.sinks) {
    const float sink = p.sinks[r.head], top = fmaxf(s.most, sink), mine = top == -INFINITY ? 0.0f : expf(s.most - top);
    s.sum = top == -INFINITY ? 0.0f : s.sum * mine + expf(sink - top);
    s.most = top;
#pragma unroll
    for (int i = 0; i < BLOCKS; ++i) s.value[i] *= mine;
  }
  const bool empty = s.sum == 0.0f;
  const int lane = static_cast<int>(threadIdx.x) % WARP;
  if (lane == 0) p.lse[lse_index(p, b, r)] = empty ? -INFINITY : s.most + logf(s.sum);
  const int64_t place =
      p.cache.cu_seqlens ? (b.token + r.query) * p.out.step : b.index * p.out.batch + r.query * p.out.step;
  T* out = static_cast<T*>(const_cast<void*>(p.out.data)) + place + r.head * p.out.head;
#pragma unroll
  for (int i = 0; i < BLOCKS; ++i)
    if (lane + WARP * i < p.value_dim) out[lane + WARP * i] = narrow<T>(empty ? 0.0f : s.value[i] / s.sum);
}

// The score of a query row and a key; -inf where the key is not attended.
__device__ __forceinline__ float score_of(const Attention& p, const BatchRow& b, const QueryRow& r, int64_t key,
                                          float dot) {
  const int64_t distance = b.total - b.count + r.query - key;
  if ((p.window_left >= 0 && distance > p.window_left) || (p.window_right >= 0 && distance < -p.window_right))
    return -INFINITY;
  const int64_t column = key - (b.total - b.count);
  if (p.tree && column >= 0 && !p.tree[(b.index * p.queries + r.query) * p.queries + column]) return -INFINITY;
  float score = dot * p.scale;
  if (p.softcap > 0) score = p.softcap * tanhf(score / p.softcap);
  if (p.slopes)
    score -= p.slopes[b.index * p.slopes_batch + r.head] * static_cast<float>(distance < 0 ? -distance : distance);
  if (p.mask.kind == MaskKind::none) return score;
  const int64_t at = b.index * p.mask.batch + r.head * p.mask.head + r.query * p.mask.row + key * p.mask.key;
  if (p.mask.kind == MaskKind::boolean) return static_cast<const uint8_t*>(p.mask.data)[at] ? score : -INFINITY;
  return score + static_cast<const float*>(p.mask.data)[at];
}

// How a launch uses shared memory and splits the keys.
struct Plan {
  int stages;                                  // tiles of keys and values under way, 1 or 2
  bool wide_k, wide_v;                         // every row of keys or values is made of aligned 16 bytes
  int key_stride, value_stride, query_stride;  // elements of a row in shared memory
  float* partial;                              // null: one block walks all chunks
  int64_t most_rows;                           // rows of the batch with more query rows are another launch's
};

// Floats of a partial result: most, sum, values.
ONEPASS_EVERYWHERE inline int64_t partial_size(const Attention& p) { return 2 + p.value_dim; }

__device__ __forceinline__ float* partial_at(const Attention& p, const Plan& plan, const BatchRow& b, const QueryRow& r,
                                             int64_t chunk) {
  return plan.partial + (lse_index(p, b, r) * MOST_CHUNKS + chunk) * partial_size(p);
}

// A tile of keys or values into shared memory, zeros where there is none; complete after commit, wait and a barrier.
template <class T>
__device__ __forceinline__ void fetch(const Attention& p, const BatchRow& b, const Heads& from, int64_t head,
                                      int64_t width, int64_t key, T* to, int stride, bool wide, int keys = KEYS) {
  const int units = static_cast<int>((width + PACK<T> - 1) / PACK<T>);
  for (int i = static_cast<int>(threadIdx.x); i < keys * units; i += static_cast<int>(blockDim.x)) {
    const int row = i / units, d = i % units * PACK<T>;
    int64_t page, slot;
    const bool there = key + row < b.end && slot_of(p.cache, b.index, key + row, page, slot);
    const T* source =
        static_cast<const T*>(from.data) + (there ? page * from.batch + slot * from.step + head * from.head + d : 0);
    T* target = to + row * stride + d;
    if (wide) {
      copy_async16(target, source, there ? 16 : 0);
    } else {
      for (int j = 0; j < PACK<T>; ++j) target[j] = there && d + j < width ? source[j] : narrow<T>(0.0f);
    }
  }
}

template <class T, int BLOCKS>
__global__ void __launch_bounds__(SHORT_BLOCK, 2) attend(Attention p, Plan plan, int64_t row_tiles) {
  const int warp = static_cast<int>(threadIdx.x) / WARP, lane = static_cast<int>(threadIdx.x) % WARP;
  const int64_t tile = blockIdx.x % row_tiles, head = blockIdx.x / row_tiles % p.kv_heads;
  const BatchRow b = batch_row(p.cache, blockIdx.x / row_tiles / p.kv_heads, p.queries, p.tokens);
  const int tile_rows = ROWS * static_cast<int>(blockDim.x) / WARP;
  const int64_t group = p.heads / p.kv_heads, rows = b.count * group, begin = tile * tile_rows;
  if (rows > plan.most_rows || begin >= rows) return;
  const int64_t end = begin + tile_rows < rows ? begin + tile_rows : rows;
  const auto query_row = [&](int64_t r) { return QueryRow{r / group, head * group + r % group}; };

  // Shared memory: the queries in float32, then the stages.
  auto queries = reinterpret_cast<float*>(dynamic_shared());
  auto keys = reinterpret_cast<T*>(queries + tile_rows * plan.query_stride);
  T* values = keys + plan.stages * KEYS * plan.key_stride;
  for (int i = static_cast<int>(threadIdx.x); i < tile_rows * plan.query_stride; i += static_cast<int>(blockDim.x)) {
    const int64_t r = begin + i / plan.query_stride, d = i % plan.query_stride;
    float x = 0;
    if (r < end && d < p.head_dim) {
      const QueryRow at = query_row(r);
      const int64_t place =
          p.cache.cu_seqlens ? (b.token + at.query) * p.q.step : b.index * p.q.batch + at.query * p.q.step;
      x = turned(p.rotary, static_cast<const T*>(p.q.data) + place + at.head * p.q.head, d,
                 b.before + (p.rotary_ordered ? at.query : 0));
    }
    queries[i] = x;
  }

  // The keys that any row here may attend to.
  const int64_t diagonal = b.total - b.count, chunk = chunk_size(b.end - b.first);
  int64_t low = b.first, high = b.end;
  if (p.window_left >= 0 && diagonal + begin / group - p.window_left > low)
    low = diagonal + begin / group - p.window_left;
  if (p.window_right >= 0 && diagonal + (end - 1) / group + p.window_right + 1 < high)
    high = diagonal + (end - 1) / group + p.window_right + 1;

  Softmax<BLOCKS> whole[ROWS];
#pragma unroll
  for (int j = 0; j < ROWS; ++j) whole[j].clear();
  const int64_t chunks = (b.end - b.first + chunk - 1) / chunk;
  const int64_t first_chunk = plan.partial ? blockIdx.y : 0, last_chunk = plan.partial ? first_chunk + 1 : chunks;
  for (int64_t c = first_chunk; c < last_chunk && c < chunks; ++c) {
    const int64_t from = b.first + c * chunk, to = from + chunk < high ? from + chunk : high;
    const int64_t start = low > from ? from + (low - from) / KEYS * KEYS : from;
    Softmax<BLOCKS> part[ROWS];
#pragma unroll
    for (int j = 0; j < ROWS; ++j) part[j].clear();

    const auto prefetch = [&](int64_t key, int stage) {
      fetch(p, b, p.k, head, p.head_dim, key, keys + stage * KEYS * plan.key_stride, plan.key_stride, plan.wide_k);
      fetch(p, b, p.v, head, p.value_dim, key, values + stage * KEYS * plan.value_stride, plan.value_stride,
            plan.wide_v);
      commit_copies();
    };
    int stage = 0;
    __syncthreads();  // the queries are there, the stages free
    if (start < to) prefetch(start, 0);
    for (int64_t key = start; key < to; key += KEYS) {
      const bool more = key + KEYS < to;
      if (more && plan.stages == 2) {
        prefetch(key + KEYS, stage ^ 1);
        wait_copies<1>();
      } else {
        wait_copies<0>();
      }
      __syncthreads();
      const T *k = keys + stage * KEYS * plan.key_stride + lane * plan.key_stride,
              *v = values + stage * KEYS * plan.value_stride;

      // Four chains a row: shorter sums round less.
      float dots[ROWS][4] = {};
      for (int d = 0; d < plan.query_stride; d += PACK<T>) {
        float x[PACK<T>];
        unpack(*reinterpret_cast<const uint4*>(k + d), x, k);
#pragma unroll
        for (int j = 0; j < ROWS; ++j) {
          const float* q = queries + (warp * ROWS + j) * plan.query_stride + d;
#pragma unroll
          for (int e = 0; e < PACK<T>; ++e) dots[j][e % 4] = fmaf(q[e], x[e], dots[j][e % 4]);
        }
      }
      int64_t page, slot;
      const bool there = key + lane < b.end && slot_of(p.cache, b.index, key + lane, page, slot);
      float probability[ROWS];
#pragma unroll
      for (int j = 0; j < ROWS; ++j) {
        const int64_t r = begin + warp * ROWS + j;
        const float dot = (dots[j][0] + dots[j][1]) + (dots[j][2] + dots[j][3]);
        const float score = there && r < end ? score_of(p, b, query_row(r), key + lane, dot) : -INFINITY;
        float top = score;
#pragma unroll
        for (int bit = WARP / 2; bit; bit /= 2) top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, bit));
        if (!(top <= part[j].most)) {
          const float shrink = expf(part[j].most - top);
          part[j].sum *= shrink;
#pragma unroll
          for (int i = 0; i < BLOCKS; ++i) part[j].value[i] *= shrink;
          part[j].most = top;
        }
        probability[j] = part[j].most == -INFINITY ? 0.0f : expf(score - part[j].most);
        part[j].sum += warp_sum(probability[j]);
      }
      for (int row = 0; row < KEYS; ++row) {
        float x[BLOCKS];
#pragma unroll
        for (int i = 0; i < BLOCKS; ++i) x[i] = widen(v[row * plan.value_stride + lane + WARP * i]);
#pragma unroll
        for (int j = 0; j < ROWS; ++j) {
          const float weight = __shfl_sync(ALL_LANES, probability[j], row);
          if (weight == 0.0f) continue;  // what is not attended may hold anything
#pragma unroll
          for (int i = 0; i < BLOCKS; ++i) part[j].value[i] = fmaf(weight, x[i], part[j].value[i]);
        }
      }
      __syncthreads();
      if (more && plan.stages == 1) prefetch(key + KEYS, 0);
      stage = plan.stages == 2 ? stage ^ 1 : 0;
    }
#pragma unroll
    for (int j = 0; j < ROWS; ++j) {
      if (!plan.partial) {
        whole[j].join(part[j].most, part[j].sum, part[j].value);
        continue;
      }
      const int64_t r = begin + warp * ROWS + j;
      if (r >= end) continue;
      float* target = partial_at(p, plan, b, query_row(r), c);
      if (lane == 0) target[0] = part[j].most, target[1] = part[j].sum;
#pragma unroll
      for (int i = 0; i < BLOCKS; ++i)
        if (lane + WARP * i < p.value_dim) target[2 + lane + WARP * i] = part[j].value[i];
    }
  }
  if (plan.partial) return;
#pragma unroll
  for (int j = 0; j < ROWS; ++j) {
    const int64_t r = begin + warp * ROWS + j;
    if (r < end) finish<T>(p, b, query_row(r), whole[j]);
  }
}

// Joins the chunks of a query row in ascending order; a warp a row.
template <class T, int BLOCKS>
__global__ void __launch_bounds__(SHORT_BLOCK) join_chunks(Attention p, Plan plan) {
  const int64_t index = group_index<WARP>(), per_row = p.queries * p.heads;
  if (index >= p.batch * per_row) return;
  const BatchRow b = batch_row(p.cache, index / per_row, p.queries, p.tokens);
  const QueryRow r{index % per_row / p.heads, index % p.heads};
  if (r.query >= b.count || b.count * (p.heads / p.kv_heads) > plan.most_rows) return;
  const int lane = static_cast<int>(threadIdx.x) % WARP;
  const int64_t keys = b.end - b.first, chunk = chunk_size(keys);
  Softmax<BLOCKS> whole;
  whole.clear();
  for (int64_t c = 0; c * chunk < keys; ++c) {
    const float* from = partial_at(p, plan, b, r, c);
    float value[BLOCKS];
#pragma unroll
    for (int i = 0; i < BLOCKS; ++i) value[i] = lane + WARP * i < p.value_dim ? from[2 + lane + WARP * i] : 0.0f;
    whole.join(from[0], from[1], value);
  }
  finish<T>(p, b, r, whole);
}

// Writes new keys, turned, and values behind those in the cache; a warp a token and head.
template <class T>
__global__ void __launch_bounds__(SHORT_BLOCK) append_keys(Append p) {
  const int64_t index = group_index<WARP>(), token = index / p.kv_heads, head = index % p.kv_heads;
  const bool ragged = p.cache.cu_seqlens;
  if (token >= (ragged ? p.tokens : p.batch * p.steps)) return;
  int64_t row = 0, step = 0;
  if (ragged) {
    while (row + 1 < p.batch && p.cache.cu_seqlens[row + 1] <= token) ++row;
    step = token - p.cache.cu_seqlens[row];
    if (step < 0 || token >= p.cache.cu_seqlens[row + 1]) return;
  } else {
    row = token / p.steps;
    step = token % p.steps;
  }
  const int64_t position = p.cache.seqlens[row] + step;
  int64_t page, slot;
  if (position < 0 || !slot_of(p.cache, row, position, page, slot)) return;
  const auto source = [&](const Heads& h) {
    return static_cast<const T*>(h.data) + (ragged ? token * h.step : row * h.batch + step * h.step) + head * h.head;
  };
  const auto target = [&](const Heads& h) {
    return static_cast<T*>(const_cast<void*>(h.data)) + page * h.batch + slot * h.step + head * h.head;
  };
  const T *k = source(p.k), *v = source(p.v);
  T *to_k = target(p.k_cache), *to_v = target(p.v_cache);
  const int lane = static_cast<int>(threadIdx.x) % WARP;
  for (int64_t d = lane; d < p.head_dim; d += WARP) to_k[d] = narrow<T>(turned(p.rotary, k, d, position));
  for (int64_t d = lane; d < p.value_dim; d += WARP) to_v[d] = v[d];
}

}  // namespace onepass::cuda
