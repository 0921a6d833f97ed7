// Kernels that are right until `fault` is true: each is a mistake that the emulator must report.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>

#include "faults.h"
#include "ptx.cuh"

using namespace onepass::cuda;

namespace faults {

// Each thread takes its neighbour's value; without the barrier a thread overtakes the one it reads from.
__global__ void missing_barrier(const float* in, float* out, bool fault) {
  __shared__ float tile[128];
  const int t = static_cast<int>(threadIdx.x);
  tile[t] = in[t];
  if (!fault) __syncthreads();
  out[t] = tile[(t + 1) % 128];
}

// The buffer is filled again while others still read it.
__global__ void early_overwrite(const float* in, float* out, bool fault) {
  __shared__ float tile[128];
  const int t = static_cast<int>(threadIdx.x);
  float sum = 0;
  for (int round = 0; round < 3; ++round) {
    tile[t] = in[t] * static_cast<float>(round + 1);
    __syncthreads();
    sum += tile[(t + 33) % 128];
    if (!fault) __syncthreads();
  }
  out[t] = sum;
}

__global__ void divergent_barrier(const float* in, float* out, bool fault) {
  const int t = static_cast<int>(threadIdx.x);
  out[t] = in[t];
  if (fault && t < 32)
    __syncthreads();
  else
    __syncthreads();
}

__global__ void early_return(const float* in, float* out, bool fault) {
  const int t = static_cast<int>(threadIdx.x);
  out[t] = in[t];
  if (fault && t >= 96) return;
  __syncthreads();
}

__global__ void deadlock(const float* in, float* out, bool fault) {
  const int t = static_cast<int>(threadIdx.x);
  if (t < 64)
    sync_threads(1, 64);
  else
    sync_threads(2, fault ? 96 : 64);
  out[t] = in[t];
}

__global__ void wrong_mask(const float* in, float* out, bool fault) {
  const int t = static_cast<int>(threadIdx.x), lane = t % 32;
  float v = in[t];
  if (lane < 16) v += __shfl_xor_sync(fault ? 0x00FFu : 0xFFFFu, v, 1);
  out[t] = v;
}

__global__ void lane_outside_mask(const float* in, float* out, bool fault) {
  const int t = static_cast<int>(threadIdx.x), lane = t % 32;
  float v = in[t];
  if (lane < 16) v += __shfl_down_sync(0xFFFFu, v, 8, fault ? 32 : 16);
  out[t] = v;
}

__global__ void lane_missing(const float* in, float* out, bool fault) {
  const int t = static_cast<int>(threadIdx.x), lane = t % 32;
  float v = in[t];
  if (!fault || lane != 5) v = __shfl_sync(~0u, v, 0);
  out[t] = v;
}

__global__ void shared_overrun(const float* in, float* out, bool fault) {
  __shared__ float tile[128];
  const int t = static_cast<int>(threadIdx.x);
  tile[t + (fault ? 1 : 0)] = in[t];
  __syncthreads();
  out[t] = tile[t];
}

// The bound is not in the type: only AddressSanitizer sees it.
__global__ void shared_overrun_by_pointer(const float* in, float* out, bool fault) {
  __shared__ float tile[128];
  const int t = static_cast<int>(threadIdx.x);
  float* p = tile;
  p[t + (fault ? 1 : 0)] = in[t];
  __syncthreads();
  out[t] = p[t];
}

__global__ void dynamic_overrun(const float* in, float* out, bool fault) {
  auto tile = reinterpret_cast<float*>(dynamic_shared());
  const int t = static_cast<int>(threadIdx.x);
  tile[t + (fault ? 1 : 0)] = in[t];
  __syncthreads();
  out[t] = tile[t];
}

__global__ void global_overrun(const float* in, float* out, bool fault) {
  const int t = static_cast<int>(threadIdx.x);
  out[t] = in[t + (fault ? 1 : 0)];
}

__global__ void uninitialised_shared(const float* in, float* out, bool fault) {
  __shared__ float tile[128];
  const int t = static_cast<int>(threadIdx.x);
  if (!fault || t != 7) tile[t] = in[t];
  __syncthreads();
  out[t] = tile[t];
}

__global__ void misaligned_vector(const float* in, float* out, bool fault) {
  const int t = static_cast<int>(threadIdx.x);
  if (t < 31) {
    const float4 v = *reinterpret_cast<const float4*>(in + 4 * t + (fault ? 1 : 0));
    out[4 * t] = v.x, out[4 * t + 1] = v.y, out[4 * t + 2] = v.z, out[4 * t + 3] = v.w;
  } else if (t < 35) {
    out[124 + t - 31] = in[124 + t - 31];
  }
}

// Two tiles on their way; the first is read while wait_group still allows two.
__global__ void unawaited_copy(const float* in, float* out, bool fault) {
  __shared__ __align__(16) float tile[2][64];
  const int t = static_cast<int>(threadIdx.x);
  for (int half = 0; half < 2; ++half) {
    if (t < 16) copy_async16(&tile[half][4 * t], in + 64 * half + 4 * t);
    commit_copies();
  }
  if (fault)
    wait_copies<2>();
  else
    wait_copies<1>();
  __syncthreads();
  if (t < 64) out[t] = tile[0][t];
  wait_copies<0>();
  __syncthreads();
  if (t >= 64) out[t] = tile[1][t - 64];
}

// A copy is seen by the thread that waited; the others need the barrier too.
__global__ void unshared_copy(const float* in, float* out, bool fault) {
  __shared__ __align__(16) float tile[128];
  const int t = static_cast<int>(threadIdx.x);
  if (t < 32) copy_async16(&tile[4 * t], in + 4 * t);
  commit_copies();
  wait_copies<0>();
  if (!fault) __syncthreads();
  out[t] = tile[127 - t];
}

// Lanes of a warp do not run in step: what one writes another reads only after __syncwarp.
__global__ void missing_warp_sync(const float* in, float* out, bool fault) {
  __shared__ float tile[128];
  const int t = static_cast<int>(threadIdx.x);
  tile[t] = in[t];
  if (!fault) __syncwarp();
  out[t] = tile[t ^ 1];
}

using Kernel = void (*)(const float*, float*, bool);
struct Named {
  const char* name;
  Kernel kernel;
};
#define NAMED(kernel) {#kernel, kernel}
const Named ALL[] = {
    NAMED(missing_barrier),
    NAMED(early_overwrite),
    NAMED(divergent_barrier),
    NAMED(early_return),
    NAMED(deadlock),
    NAMED(wrong_mask),
    NAMED(lane_outside_mask),
    NAMED(lane_missing),
    NAMED(shared_overrun),
    NAMED(shared_overrun_by_pointer),
    NAMED(dynamic_overrun),
    NAMED(global_overrun),
    NAMED(misaligned_vector),
    NAMED(unawaited_copy),
    NAMED(unshared_copy),
    NAMED(missing_warp_sync),
    NAMED(uninitialised_shared),
};

// ---- what every call does, for tests against Python ----

__global__ void warp_calls(const int* in, int* out) {
  const int t = static_cast<int>(threadIdx.x), v = in[t];
  int* mine = out + t * 10;
  mine[0] = __shfl_sync(~0u, v, 5);
  mine[1] = __shfl_sync(~0u, v, t + 3, 8);
  mine[2] = __shfl_xor_sync(~0u, v, 6);
  mine[3] = __shfl_xor_sync(~0u, v, 12, 8);
  mine[4] = __shfl_up_sync(~0u, v, 3);
  mine[5] = __shfl_down_sync(~0u, v, 3, 16);
  mine[6] = static_cast<int>(__ballot_sync(~0u, v % 3 == 0));
  mine[7] = __any_sync(~0u, v == 7);
  mine[8] = __all_sync(~0u, v > 0);
  mine[9] = t % 2 ? __shfl_sync(0xAAAAAAAAu, v, 31) : __shfl_sync(0x55555555u, v, 30);
}

__global__ void count_atomically(int* counts, float* sum) {
  atomicAdd(&counts[threadIdx.x % 3], 1);
  atomicMax(&counts[3], static_cast<int>(threadIdx.x));
  atomicAdd(sum, 1.0f);
}

template <class... P, class... A>
void launch(unsigned grid, unsigned block, void (*kernel)(P...), A... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = 128 * sizeof(float);
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

std::vector<std::string> names() {
  std::vector<std::string> all;
  for (const Named& entry : ALL) all.push_back(entry.name);
  return all;
}

std::vector<float> run(const std::string& name, bool fault) {
  for (const Named& entry : ALL) {
    if (name != entry.name) continue;
    std::vector<float> in(128), out(128, -1.0f);
    for (int i = 0; i < 128; ++i) in[static_cast<size_t>(i)] = static_cast<float>(i + 1);
    launch(1, 128, entry.kernel, in.data(), out.data(), fault);
    return out;
  }
  throw std::invalid_argument("no such kernel: " + name);
}

std::vector<int> call_warps(const std::vector<int>& in) {
  std::vector<int> out(in.size() * 10);
  launch(1, static_cast<unsigned>(in.size()), warp_calls, in.data(), out.data());
  return out;
}

std::vector<int> count(unsigned blocks, unsigned threads, float& sum) {
  std::vector<int> counts(4);
  launch(blocks, threads, count_atomically, counts.data(), &sum);
  return counts;
}

void narrow(const float* in, uint16_t* out, int64_t n, bool bf16) {
  for (int64_t i = 0; i < n; ++i) out[i] = bf16 ? __float2bfloat16_rn(in[i]).bits : __float2half_rn(in[i]).bits;
}

void widen(const uint16_t* in, float* out, int64_t n, bool bf16) {
  for (int64_t i = 0; i < n; ++i) out[i] = bf16 ? __bfloat162float({in[i]}) : __half2float({in[i]});
}

}  // namespace faults
