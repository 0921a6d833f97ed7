#include <cuda_runtime.h>

#include <stdexcept>

#include "onepass/cuda.h"

namespace onepass {
namespace {

void check(cudaError_t code) {
  if (code != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(code));
}

}  // namespace

std::vector<std::string> cuda_devices() {
  int count = 0;
  const cudaError_t code = cudaGetDeviceCount(&count);
  if (code == cudaErrorInsufficientDriver || code == cudaErrorNoDevice) return {};
  check(code);
  std::vector<std::string> lines;
  for (int i = 0; i < count; ++i) {
    cudaDeviceProp p;
    check(cudaGetDeviceProperties(&p, i));
    lines.push_back(std::string(p.name) + ", sm_" + std::to_string(p.major) + std::to_string(p.minor) + ", " +
                    std::to_string(p.multiProcessorCount) + " SMs");
  }
  return lines;
}

}  // namespace onepass
