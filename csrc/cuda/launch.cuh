// What launchers share: the device, the launch, and return codes as exceptions.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

#include "device.cuh"
#include "onepass/cuda.h"
#include "onepass/dtype.h"

namespace onepass::cuda {

inline void check(cudaError_t code) {
  if (code != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(code));
}

// The current device while it lives; then the one before.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    check(cudaGetDevice(&before_));
    if (device != before_) check(cudaSetDevice(device));
    changed_ = device != before_;
  }
  ~OnDevice() {
    if (changed_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

inline unsigned grid_size(int64_t blocks) {
  if (blocks > 0x7FFFFFFF) throw std::runtime_error("CUDA: too many blocks: " + std::to_string(blocks));
  return static_cast<unsigned>(blocks);
}

// kernel<<<grid, threads, shared>>>(arguments...) on that stream.
template <class... Parameters, class... Arguments>
void launch(const Stream& stream, dim3 grid, unsigned threads, size_t shared, void (*kernel)(Parameters...),
            Arguments&&... arguments) {
  const OnDevice guard(stream.device);
  if (shared > 48 * 1024)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)));
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(stream.handle);
  check(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...));
}

// A kernel on rows in tiles (see Tile in device.cuh), its first parameter the number of groups of threads: `by_warp`
// where rows are short, else `by_block`.
template <class... Parameters, class... Arguments>
void launch_tiles(const Stream& stream, int64_t rows, int64_t length, int64_t tile,
                  void (*by_warp)(int64_t, Parameters...), void (*by_block)(int64_t, Parameters...),
                  Arguments&&... arguments) {
  const int64_t groups = rows * ((length + tile - 1) / tile), warps = SHORT_BLOCK / WARP;
  if (length <= SHORT_ROW)
    launch(stream, grid_size((groups + warps - 1) / warps), SHORT_BLOCK, 0, by_warp, groups, arguments...);
  else
    launch(stream, grid_size(groups), BLOCK, 0, by_block, groups, arguments...);
}

// body(T{}) with T the element type on the device.
template <class Body>
void with_device_dtype(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::f32: return body(float{});
    case DType::bf16: return body(__nv_bfloat16{});
    case DType::f16: return body(__half{});
  }
}

}  // namespace onepass::cuda
