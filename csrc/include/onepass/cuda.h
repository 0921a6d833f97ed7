// What CUDA launchers share. Where a kernel has a function in namespace onepass::cuda it takes the same arguments as
// the CPU's: every pointer is device memory, num_threads is not read, and nothing waits for the device. A code other
// than success becomes a std::runtime_error.
#pragma once
#include <string>
#include <vector>

namespace onepass {

// Where a kernel runs: torch's device index and current stream.
struct Stream {
  int device;
  void* handle;  // cudaStream_t
};

// One line a device, "name, sm_XY, N SMs"; empty without a device or driver. Throws std::runtime_error on any other
// error. Needs no driver to link or to load.
std::vector<std::string> cuda_devices();

}  // namespace onepass
