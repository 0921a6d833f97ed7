// What kernels share: elements in memory and in registers, sums over threads, rows in tiles.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "onepass/dtype.h"
#include "onepass/rows.h"
#include "ptx.cuh"

namespace onepass::cuda {

inline constexpr int WARP = 32;
inline constexpr unsigned ALL_LANES = ~0u;

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }

template <class T>
__device__ __forceinline__ T narrow(float x);
template <>
__device__ __forceinline__ float narrow<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half narrow<__half>(float x) {
  return __float2half_rn(x);
}

// Elements of 16 bytes, the widest load there is for a thread everywhere.
template <class T>
inline constexpr int PACK = 16 / static_cast<int>(sizeof(T));

__device__ __forceinline__ void unpack(const uint4& raw, float* x, const float*) {
  x[0] = __uint_as_float(raw.x);
  x[1] = __uint_as_float(raw.y);
  x[2] = __uint_as_float(raw.z);
  x[3] = __uint_as_float(raw.w);
}
__device__ __forceinline__ void unpack(const uint4& raw, float* x, const __nv_bfloat16*) {
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[2 * i] = __uint_as_float(words[i] << 16);
    x[2 * i + 1] = __uint_as_float(words[i] & 0xFFFF0000u);
  }
}
__device__ __forceinline__ void unpack(const uint4& raw, float* x, const __half*) {
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    __half2 pair;
    memcpy(&pair, &words[i], sizeof pair);
    const float2 wide = __half22float2(pair);
    x[2 * i] = wide.x;
    x[2 * i + 1] = wide.y;
  }
}

__device__ __forceinline__ uint32_t pair(float a, float b, const __nv_bfloat16*) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(a, b);
  uint32_t word;
  memcpy(&word, &both, sizeof word);
  return word;
}
__device__ __forceinline__ uint32_t pair(float a, float b, const __half*) {
  const __half2 both = __floats2half2_rn(a, b);
  uint32_t word;
  memcpy(&word, &both, sizeof word);
  return word;
}

__device__ __forceinline__ uint4 packed(const float* x, const float*) {
  return make_uint4(__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]), __float_as_uint(x[3]));
}
template <class T>
__device__ __forceinline__ uint4 packed(const float* x, const T* type) {
  return make_uint4(pair(x[0], x[1], type), pair(x[2], x[3], type), pair(x[4], x[5], type), pair(x[6], x[7], type));
}

ONEPASS_EVERYWHERE inline bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Whether N elements, half a pack or whole ones, are read and written in wide pieces there.
template <int N, class T>
__device__ __forceinline__ bool aligned_wide(const T* p) {
  static_assert(N % PACK<T> == 0 || 2 * N == PACK<T>);
  return reinterpret_cast<uintptr_t>(p) % (N < PACK<T> ? 8 : 16) == 0;
}

// Elements i .. i + N - 1 of p; zeros for those outside [0, count).
template <int N, class T>
__device__ __forceinline__ void load(const T* p, int64_t i, int64_t count, float (&x)[N]) {
  if (i >= 0 && i + N <= count && aligned_wide<N>(p + i)) {
    if constexpr (N < PACK<T>) {
      const uint2 raw = load8(p + i);
      float whole[PACK<T>];
      unpack(make_uint4(raw.x, raw.y, 0, 0), whole, p);
#pragma unroll
      for (int j = 0; j < N; ++j) x[j] = whole[j];
    } else {
#pragma unroll
      for (int j = 0; j < N; j += PACK<T>) unpack(load16(p + i + j), x + j, p);
    }
    return;
  }
#pragma unroll
  for (int j = 0; j < N; ++j) x[j] = i + j >= 0 && i + j < count ? widen(p[i + j]) : 0.0f;
}

// The same elements, those inside alone.
template <int N, class T>
__device__ __forceinline__ void store(T* p, int64_t i, int64_t count, const float (&x)[N]) {
  if (i >= 0 && i + N <= count && aligned_wide<N>(p + i)) {
    if constexpr (N < PACK<T>) {
      store8(p + i, make_uint2(pair(x[0], x[1], p), pair(x[2], x[3], p)));
    } else {
#pragma unroll
      for (int j = 0; j < N; j += PACK<T>) store16(p + i + j, packed(x + j, p));
    }
    return;
  }
#pragma unroll
  for (int j = 0; j < N; ++j)
    if (i + j >= 0 && i + j < count) p[i + j] = narrow<T>(x[j]);
}

// Of all lanes, in every lane, in an order of its own that never changes.
template <class X>
__device__ __forceinline__ X warp_sum(X x) {
#pragma unroll
  for (int bit = WARP / 2; bit; bit /= 2) x += __shfl_xor_sync(ALL_LANES, x, bit);
  return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int bit = WARP / 2; bit; bit /= 2) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, bit));
  return x;
}

// Of all threads of the block, in every thread.
template <int THREADS, class X>
__device__ __forceinline__ X block_sum(X x) {
  __shared__ X partial[THREADS / WARP];
  x = warp_sum(x);
  __syncthreads();  // an earlier call's sums have been read
  if (threadIdx.x % WARP == 0) partial[threadIdx.x / WARP] = x;
  __syncthreads();
  X total = 0;
#pragma unroll
  for (int warp = 0; warp < THREADS / WARP; ++warp) total += partial[warp];
  return total;
}

// Rows are cut into tiles of `tile` elements, each the work of a group of threads: a block, or a warp of a block of
// four where rows are short. The cut reads the length of a row and nothing else.
struct Tile {
  int64_t row, begin, end;
};

inline constexpr int64_t SHORT_ROW = 512;
inline constexpr int BLOCK = 256, SHORT_BLOCK = 128;

template <int THREADS>
__device__ __forceinline__ int place_in_group() {
  return static_cast<int>(threadIdx.x) % THREADS;
}

template <int THREADS>
__device__ __forceinline__ int64_t group_index() {
  return (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / THREADS;
}

__device__ __forceinline__ Tile tile_at(int64_t index, int64_t length, int64_t tile) {
  const int64_t tiles = (length + tile - 1) / tile, row = index / tiles, begin = (index - row * tiles) * tile;
  return {row, begin, begin + tile < length ? begin + tile : length};
}

// Of all threads of a group, in every thread.
template <int THREADS, class X>
__device__ __forceinline__ X group_sum(X x) {
  if constexpr (THREADS == WARP)
    return warp_sum(x);
  else
    return block_sum<THREADS>(x);
}

template <int THREADS>
__device__ __forceinline__ float group_max(float x) {
  x = warp_max(x);
  if constexpr (THREADS > WARP) {
    __shared__ float of_warps[THREADS / WARP];
    __syncthreads();  // an earlier call's have been read
    if (threadIdx.x % WARP == 0) of_warps[threadIdx.x / WARP] = x;
    __syncthreads();
#pragma unroll
    for (int warp = 0; warp < THREADS / WARP; ++warp) x = fmaxf(x, of_warps[warp]);
  }
  return x;
}

// Waits for the threads of a group.
template <int THREADS>
__device__ __forceinline__ void sync_group() {
  if constexpr (THREADS == WARP)
    __syncwarp();
  else
    __syncthreads();
}

template <class T>
__device__ __forceinline__ const T* row_of(const RowsIn& rows, const Tile& tile) {
  return static_cast<const T*>(rows.data) + tile.row * rows.step + tile.begin;
}

}  // namespace onepass::cuda
