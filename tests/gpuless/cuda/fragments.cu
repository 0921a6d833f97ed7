// A product of 16 x 16 matrices by ldmatrix and mma: the emulator runs it, and nvcc compiles it for a GPU, so that the
// fragment layouts are checked by the same code against the PTX ISA and against a device.
#include <cuda_runtime.h>

#include "fragments.h"
#include "ptx.cuh"

using namespace onepass::cuda;

namespace {

__global__ void product(const uint16_t* a, const uint16_t* b, float* d, bool bf16, bool transposed) {
  __shared__ __align__(16) uint16_t left[16][16];
  __shared__ __align__(16) uint16_t right[16][16];  // [k][n], or [n][k] where not transposed
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = lane; i < 256; i += 32) left[i / 16][i % 16] = a[i], right[i / 16][i % 16] = b[i];
  __syncwarp();
  uint32_t fa[4], fb[4];
  load_matrices(fa, &left[lane % 16][lane / 16 * 8]);
  // Matrices in the order (k low, n low) (k high, n low) (k low, n high) (k high, n high)
  const int low = lane % 8 + lane / 8 % 2 * 8, high = lane / 16 * 8;
  if (transposed)
    load_matrices_transposed(fb, &right[low][high]);
  else
    load_matrices(fb, &right[lane % 8 + high][lane / 8 % 2 * 8]);
  for (int n = 0; n < 2; ++n) {
    float acc[4] = {0, 0, 0, 0};
    if (bf16)
      mma_bf16(acc, fa, fb[2 * n], fb[2 * n + 1]);
    else
      mma_f16(acc, fa, fb[2 * n], fb[2 * n + 1]);
    for (int r = 0; r < 4; ++r) d[(lane / 4 + r / 2 * 8) * 16 + n * 8 + lane % 4 * 2 + r % 2] = acc[r];
  }
}

}  // namespace

extern "C" int multiply_fragments(const uint16_t* a, const uint16_t* b, float* d, bool bf16, bool transposed) {
  cudaLaunchConfig_t config{};
  config.gridDim = 1;
  config.blockDim = 32;
  return cudaLaunchKernelEx(&config, product, a, b, d, bf16, transposed);
}
