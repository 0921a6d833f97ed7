// Instructions that CUDA C++ has no plain function for: wide accesses, asynchronous copies, named barriers and tensor
// cores.
// Without nvcc the bodies are the block emulator's (tests/gpuless/cuda).
#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#if !defined(__CUDACC__)
#include "emulator_ptx.h"
#endif

namespace onepass::cuda {

// The dynamic shared memory of a launch, aligned for 16-byte copies.
__device__ inline unsigned char* dynamic_shared() {
#if defined(__CUDACC__)
  extern __shared__ __align__(128) unsigned char memory[];
  return memory;
#else
  return emulator::dynamic_shared();
#endif
}

#if defined(__CUDACC__)

__device__ __forceinline__ unsigned shared_address(const void* p) {
  return static_cast<unsigned>(__cvta_generic_to_shared(p));
}

// Global memory, 16 or 8 bytes at an aligned address in one instruction: nvcc takes a plain uint4 apart where the
// scalar path beside it loads the same elements.
__device__ __forceinline__ uint4 load16(const void* p) {
  uint4 v;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(__cvta_generic_to_global(p)));
  return v;
}
__device__ __forceinline__ void store16(void* p, const uint4& v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)), "r"(v.x), "r"(v.y),
               "r"(v.z), "r"(v.w)
               : "memory");
}
__device__ __forceinline__ uint2 load8(const void* p) {
  uint2 v;
  asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(__cvta_generic_to_global(p)));
  return v;
}
__device__ __forceinline__ void store8(void* p, const uint2& v) {
  asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(p)), "r"(v.x), "r"(v.y) : "memory");
}

// 16 bytes from global to shared memory, the first `valid` of them from `from`, the rest zeros. They may be read after
// commit, wait and a barrier.
__device__ __forceinline__ void copy_async16(void* to, const void* from, int valid = 16) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid)
               : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most the `newest` last groups of this thread are on their way.
template <int newest>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(newest) : "memory");
}

// Barrier `id` (1 to 15; 0 is __syncthreads) of `count` threads, whole warps.
__device__ __forceinline__ void sync_threads(int id, int count) {
  asm volatile("barrier.sync %0, %1;" ::"r"(id), "r"(count) : "memory");
}
__device__ __forceinline__ void arrive_threads(int id, int count) {
  asm volatile("barrier.arrive %0, %1;" ::"r"(id), "r"(count) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements: lane l names row l % 8 of matrix l / 8 and gets, of each matrix, elements
// (l / 4, 2 (l % 4)) and the one beside it; transposed: of the transposed matrix.
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row)));
}
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row)));
}

// d += a b with a 16 x 16 and b 16 x 8, accumulated in float32; fragments as in PTX's mma.m16n8k16.
__device__ __forceinline__ void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

#else

inline uint4 load16(const void* p) { return *static_cast<const uint4*>(p); }
inline void store16(void* p, const uint4& v) { *static_cast<uint4*>(p) = v; }
inline uint2 load8(const void* p) { return *static_cast<const uint2*>(p); }
inline void store8(void* p, const uint2& v) { *static_cast<uint2*>(p) = v; }

inline void copy_async16(void* to, const void* from, int valid = 16, EMULATOR_SITE) {
  emulator::copy_async(to, from, 16, valid, site);
}
inline void commit_copies() { emulator::commit_copies(); }
template <int newest>
inline void wait_copies() {
  emulator::wait_copies(newest);
}
inline void sync_threads(int id, int count, EMULATOR_SITE) {
  emulator::barrier("barrier.sync", id, count, false, site);
}
inline void arrive_threads(int id, int count, EMULATOR_SITE) {
  emulator::barrier("barrier.arrive", id, count, true, site);
}
inline void load_matrices(uint32_t (&to)[4], const void* row, EMULATOR_SITE) {
  emulator::load_matrices(to, row, false, site);
}
inline void load_matrices_transposed(uint32_t (&to)[4], const void* row, EMULATOR_SITE) {
  emulator::load_matrices(to, row, true, site);
}
inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, EMULATOR_SITE) {
  emulator::mma("mma_bf16", d, a, b0, b1, [](uint16_t bits) { return __bfloat162float({bits}); }, site);
}
inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, EMULATOR_SITE) {
  emulator::mma("mma_f16", d, a, b0, b1, [](uint16_t bits) { return __half2float({bits}); }, site);
}

#endif

}  // namespace onepass::cuda
