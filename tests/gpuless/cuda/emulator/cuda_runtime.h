// Stands in for the toolkit's cuda_runtime.h: the language, the intrinsics and the few calls of the runtime that this
// project's device code and launchers use. What is missing here does not compile: add it when a kernel needs it.
#pragma once
#include <dlfcn.h>
#include <math.h>

#include <cstdint>
#include <cstring>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) __attribute__((aligned(bytes)))
// Shared memory is a block's own and begins undefined. ASan watches the bounds of static variables, not of thread-local
// ones; thread-local ones lie together, so that each block can find them full of NaN.
#if defined(__SANITIZE_ADDRESS__)
#define __shared__ static
#else
#define __shared__ static thread_local
#endif

// ---- vector types ----

struct alignas(8) float2 {
  float x, y;
};
struct float3 {
  float x, y, z;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct uint3 {
  unsigned x, y, z;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

// ---- barriers ----

inline void __syncthreads(EMULATOR_SITE) { emulator::barrier("__syncthreads", 0, 0, false, site); }

inline void __syncwarp(uint32_t mask = ~0u, EMULATOR_SITE) {
  void* token = emulator::warp_token();
  emulator::release(token);
  emulator::warp_call("__syncwarp", mask, &mask, [](void* const*, uint32_t, emulator::Site) {}, site);
  emulator::acquire(token);
}

inline void __threadfence() {}
inline void __threadfence_block() {}

// ---- warp-wide calls; none of them orders memory ----

namespace emulator {

template <class T>
struct Shuffled {
  T given, taken;
  int source;  // lane; its own where there is none to read from
};

template <class T>
T shuffle(const char* name, uint32_t mask, T value, int source, Site site) {
  Shuffled<T> mine{value, value, source};
  warp_call(
      name, mask, &mine,
      [](void* const* lanes, uint32_t, Site where) {
        for (int i = 0; i < WARP; ++i) {
          if (!lanes[i]) continue;
          auto& to = *static_cast<Shuffled<T>*>(lanes[i]);
          if (!lanes[to.source])
            fail("lane " + std::to_string(i) + " shuffles from lane " + std::to_string(to.source) +
                     ", which is not in the mask,",
                 where);
          to.taken = static_cast<Shuffled<T>*>(lanes[to.source])->given;
        }
      },
      site);
  return mine.taken;
}

struct Vote {
  int predicate;
  uint32_t ballot;
};

inline uint32_t vote(const char* name, uint32_t mask, int predicate, Site site) {
  Vote mine{predicate, 0};
  warp_call(
      name, mask, &mine,
      [](void* const* lanes, uint32_t, Site) {
        uint32_t ballot = 0;
        for (int i = 0; i < WARP; ++i)
          if (lanes[i] && static_cast<Vote*>(lanes[i])->predicate) ballot |= 1u << i;
        for (int i = 0; i < WARP; ++i)
          if (lanes[i]) static_cast<Vote*>(lanes[i])->ballot = ballot;
      },
      site);
  return mine.ballot;
}

}  // namespace emulator

// Lanes are taken in groups of `width`, a power of two.
template <class T>
T __shfl_sync(uint32_t mask, T v, int source, int width = 32, EMULATOR_SITE) {
  return emulator::shuffle("__shfl_sync", mask, v, (emulator::lane() & -width) | (source & (width - 1)), site);
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T v, int bits, int width = 32, EMULATOR_SITE) {
  const int me = emulator::lane(), from = me ^ bits;
  return emulator::shuffle("__shfl_xor_sync", mask, v, from < (me & -width) + width ? from : me, site);
}
template <class T>
T __shfl_up_sync(uint32_t mask, T v, unsigned by, int width = 32, EMULATOR_SITE) {
  const int me = emulator::lane(), from = me - static_cast<int>(by);
  return emulator::shuffle("__shfl_up_sync", mask, v, from >= (me & -width) ? from : me, site);
}
template <class T>
T __shfl_down_sync(uint32_t mask, T v, unsigned by, int width = 32, EMULATOR_SITE) {
  const int me = emulator::lane(), from = me + static_cast<int>(by);
  return emulator::shuffle("__shfl_down_sync", mask, v, from < (me & -width) + width ? from : me, site);
}
inline uint32_t __ballot_sync(uint32_t mask, int predicate, EMULATOR_SITE) {
  return emulator::vote("__ballot_sync", mask, predicate, site);
}
inline int __any_sync(uint32_t mask, int predicate, EMULATOR_SITE) {
  return emulator::vote("__any_sync", mask, predicate, site) != 0;
}
inline int __all_sync(uint32_t mask, int predicate, EMULATOR_SITE) {
  return emulator::vote("__all_sync", mask, !predicate, site) == 0;
}

// ---- atomics ----

namespace emulator {

template <class T, class F>
T update(T* at, F&& change, Site site) {
  if (reinterpret_cast<uintptr_t>(at) % sizeof(T)) fail("misaligned atomic", site);
  T old, next;
  __atomic_load(at, &old, __ATOMIC_RELAXED);
  do {
    next = change(old);
  } while (!__atomic_compare_exchange(at, &old, &next, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED));
  return old;
}

}  // namespace emulator

template <class T>
T atomicAdd(T* at, T v, EMULATOR_SITE) {
  return emulator::update(at, [=](T x) { return static_cast<T>(x + v); }, site);
}
template <class T>
T atomicMax(T* at, T v, EMULATOR_SITE) {
  return emulator::update(at, [=](T x) { return x < v ? v : x; }, site);
}
template <class T>
T atomicMin(T* at, T v, EMULATOR_SITE) {
  return emulator::update(at, [=](T x) { return v < x ? v : x; }, site);
}
template <class T>
T atomicExch(T* at, T v, EMULATOR_SITE) {
  return emulator::update(at, [=](T) { return v; }, site);
}
template <class T>
T atomicCAS(T* at, T expected, T v, EMULATOR_SITE) {
  return emulator::update(at, [=](T x) { return x == expected ? v : x; }, site);
}
inline unsigned atomicInc(unsigned* at, unsigned limit, EMULATOR_SITE) {
  return emulator::update(at, [=](unsigned x) { return x >= limit ? 0u : x + 1; }, site);
}

// ---- arithmetic; each _rn operation is rounded on its own (-ffp-contract=off) ----

inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float a) { return expf(a); }
inline float __logf(float a) { return logf(a); }
inline float rsqrtf(float a) { return 1.0f / sqrtf(a); }
inline float __saturatef(float a) { return a > 0.0f ? (a < 1.0f ? a : 1.0f) : 0.0f; }
inline float __uint2float_rn(unsigned a) { return static_cast<float>(a); }
inline float __int2float_rn(int a) { return static_cast<float>(a); }
inline int __float2int_rz(float a) { return static_cast<int>(a); }
inline int __float2int_rn(float a) { return static_cast<int>(nearbyintf(a)); }

template <class To, class From>
inline To emulator_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
inline int __float_as_int(float a) { return emulator_bits<int>(a); }
inline unsigned __float_as_uint(float a) { return emulator_bits<unsigned>(a); }
inline float __int_as_float(int a) { return emulator_bits<float>(a); }
inline float __uint_as_float(unsigned a) { return emulator_bits<float>(a); }

inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }
inline int __popc(unsigned a) { return __builtin_popcount(a); }
inline int __ffs(unsigned a) { return __builtin_ffs(static_cast<int>(a)); }
inline int __clz(unsigned a) { return a ? __builtin_clz(a) : 32; }

inline int min(int a, int b) { return b < a ? b : a; }
inline int max(int a, int b) { return a < b ? b : a; }
inline unsigned min(unsigned a, unsigned b) { return b < a ? b : a; }
inline unsigned max(unsigned a, unsigned b) { return a < b ? b : a; }
inline long min(long a, long b) { return b < a ? b : a; }
inline long max(long a, long b) { return a < b ? b : a; }

template <class T>
T __ldg(const T* at) {
  return *at;
}
template <class T>
T __ldcs(const T* at) {
  return *at;
}
template <class T>
void __stcs(T* at, T v) {
  *at = v;
}

[[noreturn]] inline void __trap(EMULATOR_SITE) { emulator::fail("__trap", site); }

// ---- the runtime ----

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101
};
using cudaStream_t = struct CUstream_st*;
struct cudaLaunchAttribute;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

const char* cudaGetErrorString(cudaError_t);
cudaError_t cudaGetLastError();
cudaError_t cudaGetDevice(int*);
cudaError_t cudaSetDevice(int);  // 0 is the only one
cudaError_t emulator_set_shared_limit(const void* kernel, int bytes);
// What a device would say of these sizes.
cudaError_t emulator_check(const cudaLaunchConfig_t&, const void* kernel);

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
  return emulator_set_shared_limit(reinterpret_cast<const void*>(kernel), bytes);
}

std::string emulator_name(const void* kernel);

template <class... Expected, class... Given>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Expected...), Given&&... given) {
  const auto address = reinterpret_cast<const void*>(kernel);
  if (const cudaError_t error = emulator_check(*config, address)) return error;
  const std::tuple<std::decay_t<Expected>...> arguments(std::forward<Given>(given)...);
  const dim3 grid = config->gridDim, block = config->blockDim;
  emulator::launch({grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, config->dynamicSmemBytes,
                   emulator_name(address).c_str(), [&] { std::apply(kernel, arguments); });
  return cudaSuccess;
}
