// Joins partial attention. Bytes: a part and its LSE are read once and the result is written once; the gradient reads
// the parts once too and writes theirs. A row of the result is the work of as many lanes as have 16 bytes of a part
// each, so a warp takes several short rows. A lane weighs a part, the others hear of it by shuffles; a part that saw no
// key (lse -inf) is not read. The lanes and the order of every sum follow from the channels and the number of parts.
#pragma once
#include <cmath>

#include "device.cuh"
#include "onepass/attention_merge.h"

namespace onepass::cuda {

inline constexpr int AHEAD = 4;  // parts that are fetched before the first of them is used

template <int LANES, class X>
__device__ __forceinline__ X lanes_sum(X x) {
#pragma unroll
  for (int bit = LANES / 2; bit; bit /= 2) x += __shfl_xor_sync(ALL_LANES, x, bit);
  return x;
}

// a / b of numbers that are not negative, in 32 bits where they fit: a third of the instructions.
__device__ __forceinline__ int64_t quotient(int64_t a, int64_t b) {
  return (a | b) >> 32 ? a / b : static_cast<int64_t>(static_cast<uint32_t>(a) / static_cast<uint32_t>(b));
}

// One row (b, i, h) of the result: where its parts lie and what they weigh. Lanes behind the last row follow it, for
// shuffles ask all lanes of a warp, and write nothing.
template <class T, int LANES>
struct MergeRow {
  const Merge& p;
  int64_t rows, at, lse_at;  // at: row of [B, S, H]; lse_at: of [B, H, S]
  const T* outs;
  const float* lses;
  int lane;
  bool there;
  float top, whole, sink;  // of exponentials less the largest: their sum, and what of it the sink holds

  __device__ __forceinline__ explicit MergeRow(const Merge& call) : p(call), rows(p.batch * p.length * p.heads) {
    const int64_t index = group_index<LANES>();
    lane = place_in_group<LANES>();
    there = index < rows;
    at = there ? index : rows - 1;
    const int64_t step = quotient(at, p.heads), h = at - step * p.heads;
    const int64_t b = quotient(step, p.length), i = step - b * p.length;
    lse_at = (b * p.heads + h) * p.length + i;
    outs = static_cast<const T*>(p.outs.data) + b * p.outs.batch + i * p.outs.step + h * p.outs.head;
    lses = p.lses + b * p.lse_batch + h * p.lse_head + i * p.lse_step;
    const float given = p.sinks ? p.sinks[h] : -INFINITY;
    top = given;
#pragma unroll 1
    for (int64_t n = lane; n < p.parts; n += LANES) top = fmaxf(top, lses[n * p.lse_part]);
#pragma unroll
    for (int bit = LANES / 2; bit; bit /= 2) top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, bit));
    double total = 0;
#pragma unroll 1
    for (int64_t n = lane; n < p.parts; n += LANES) total += weight(lses[n * p.lse_part]);
    sink = weight(given);
    whole = static_cast<float>(lanes_sum<LANES>(total) + sink);
  }

  __device__ __forceinline__ float weight(float lse) const { return lse == -INFINITY ? 0.0f : expf(lse - top); }
  __device__ __forceinline__ bool none() const { return whole == 0; }
  // Of the result that part n gives: 0 of one that saw no key, and behind the last.
  __device__ __forceinline__ float share(int64_t n) const {
    return n < p.parts ? weight(lses[n * p.lse_part]) / (none() ? 1.0f : whole) : 0.0f;
  }
};

// Channels d ... of a row as they lie in memory, so that many are under way before one is used; else zeros.
template <bool WIDE, class T>
__device__ __forceinline__ uint4 fetch(const T* row, int64_t d, int64_t dim, bool wanted) {
  if constexpr (WIDE) {
    return wanted && d < dim ? load16(row + d) : make_uint4(0, 0, 0, 0);
  } else {
    T x[PACK<T>];
#pragma unroll
    for (int j = 0; j < PACK<T>; ++j) x[j] = wanted && d + j < dim ? row[d + j] : narrow<T>(0.0f);
    uint4 raw;
    memcpy(&raw, x, sizeof raw);
    return raw;
  }
}

template <bool WIDE, class T>
__device__ __forceinline__ void put(T* row, int64_t d, int64_t dim, const float (&x)[PACK<T>]) {
  if constexpr (WIDE) {
    if (d < dim) store16(row + d, packed(x, row));
  } else {
    store(row, d, dim, x);
  }
}

template <class T, int LANES, bool WIDE>
__global__ void __launch_bounds__(SHORT_BLOCK, 1) merge_parts(Merge p, T* out, float* lse) {
  const MergeRow<T, LANES> row(p);
  if (row.there && row.lane == 0) lse[row.lse_at] = row.none() ? -INFINITY : row.top + logf(row.whole);
  for (int64_t chunk = 0; chunk < p.dim; chunk += LANES * PACK<T>) {
    const int64_t d = chunk + row.lane * PACK<T>;
    float total[PACK<T>] = {};
    for (int64_t first = 0; first < p.parts; first += LANES) {
      const float own = row.share(first + row.lane);
      const int count = static_cast<int>(p.parts - first < LANES ? p.parts - first : LANES);
      float some[PACK<T>] = {};
      for (int n = 0; n < count; n += AHEAD) {
        float share[AHEAD];
        uint4 raw[AHEAD];
#pragma unroll
        for (int a = 0; a < AHEAD; ++a) {
          share[a] = __shfl_sync(ALL_LANES, own, n + a, LANES);
          raw[a] = fetch<WIDE>(row.outs + (first + n + a) * p.part, d, p.dim, share[a] != 0);
        }
#pragma unroll
        for (int a = 0; a < AHEAD; ++a) {
          float x[PACK<T>];
          unpack(raw[a], x, out);
#pragma unroll
          for (int j = 0; j < PACK<T>; ++j) some[j] = fmaf(share[a], x[j], some[j]);
        }
      }
#pragma unroll
      for (int j = 0; j < PACK<T>; ++j) total[j] += some[j];
    }
    if (row.there) put<WIDE>(out + row.at * p.dim, d, p.dim, total);
  }
}

// With w_n = e^(lse_n - lse) and s_n = dout . out_n: dout_n = w_n dout, dlse_n = w_n (s_n - sum_m w_m s_m + dlse). The
// result itself is not read: it was rounded. A lane keeps s of its part, or where it has several writes them to dlses,
// which it alone reads again.
template <class T, int LANES, bool WIDE>
__global__ void __launch_bounds__(SHORT_BLOCK, 1) merge_parts_backward(MergeBackward call) {
  const Merge& p = call.forward;
  const MergeRow<T, LANES> row(p);
  const T* grad = static_cast<const T*>(call.grad_out) + row.at * p.dim;
  float *dlses = call.dlses + row.lse_at, kept = 0;
  const bool held = p.parts <= LANES, stored = row.there && !held;
  for (int64_t chunk = 0; chunk == 0 || chunk < p.dim; chunk += LANES * PACK<T>) {
    const int64_t d = chunk + row.lane * PACK<T>;
    float g[PACK<T>];
    unpack(fetch<WIDE>(grad, d, p.dim, true), g, grad);
    for (int64_t first = 0; first < p.parts; first += LANES) {
      const int64_t mine = first + row.lane;
      const float own = row.share(mine);
      const int count = static_cast<int>(p.parts - first < LANES ? p.parts - first : LANES);
      float inner = 0;
      for (int n = 0; n < count; n += AHEAD) {
        float share[AHEAD];
        uint4 raw[AHEAD];
#pragma unroll
        for (int a = 0; a < AHEAD; ++a) {
          share[a] = __shfl_sync(ALL_LANES, own, n + a, LANES);
          raw[a] = fetch<WIDE>(row.outs + (first + n + a) * p.part, d, p.dim, share[a] != 0);
        }
#pragma unroll
        for (int a = 0; a < AHEAD; ++a) {
          float x[PACK<T>], dout[PACK<T>], dot = 0;
          unpack(raw[a], x, grad);
#pragma unroll
          for (int j = 0; j < PACK<T>; ++j) {
            dot = fmaf(g[j], x[j], dot);
            dout[j] = share[a] == 0 ? 0.0f : share[a] * g[j];
          }
          dot = lanes_sum<LANES>(dot);
          if (row.lane == n + a && share[a] != 0) inner = dot;
          T* target = static_cast<T*>(call.douts) + ((first + n + a) * row.rows + row.at) * p.dim;
          if (row.there && n + a < count) put<WIDE>(target, d, p.dim, dout);
        }
      }
      kept += inner;
      if (stored && mine < p.parts) dlses[mine * row.rows] = inner + (chunk ? dlses[mine * row.rows] : 0.0f);
    }
  }
  double mean = 0;
#pragma unroll 1
  for (int64_t n = row.lane; n < p.parts; n += LANES)
    mean += static_cast<double>(row.share(n)) * (stored ? dlses[n * row.rows] : kept);
  mean = lanes_sum<LANES>(mean);
  if (!row.there) return;
  const float on_lse = call.grad_lse ? call.grad_lse[row.lse_at] : 0.0f;
#pragma unroll 1
  for (int64_t n = row.lane; n < p.parts; n += LANES) {
    const float share = row.share(n);
    const double inner = stored ? dlses[n * row.rows] : kept;
    dlses[n * row.rows] = share == 0 ? 0.0f : share * static_cast<float>(inner - mean + on_lse);
  }
  if (call.dsinks && row.lane == 0)
    call.dsinks[row.lse_at] = row.sink / (row.none() ? 1.0f : row.whole) * static_cast<float>(on_lse - mean);
}

}  // namespace onepass::cuda
