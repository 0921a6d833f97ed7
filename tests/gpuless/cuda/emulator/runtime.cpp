// The calls of the CUDA runtime, as a machine with one device of the smallest limits answers them (compute capability
// 8.0 and later; 99 KiB of shared memory for a block that asks for it, as on 8.6 and 12.0).
#include <cxxabi.h>

#include <map>

#include "cuda_runtime.h"

namespace {

constexpr size_t DEFAULT_SHARED = 48 * 1024, MOST_SHARED = 99 * 1024;
constexpr unsigned MOST_THREADS = 1024, MOST_BLOCKS_YZ = 65535;

std::map<const void*, size_t>& shared_limits() {
  static std::map<const void*, size_t> limits;
  return limits;
}

}  // namespace

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
  }
  return "unknown error";
}

cudaError_t cudaGetLastError() { return cudaSuccess; }

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidDevice; }

cudaError_t emulator_set_shared_limit(const void* kernel, int bytes) {
  if (bytes < 0 || static_cast<size_t>(bytes) > MOST_SHARED) return cudaErrorInvalidValue;
  shared_limits()[kernel] = static_cast<size_t>(bytes);
  return cudaSuccess;
}

cudaError_t emulator_check(const cudaLaunchConfig_t& c, const void* kernel) {
  const auto found = shared_limits().find(kernel);
  const size_t limit = found == shared_limits().end() ? DEFAULT_SHARED : std::max(DEFAULT_SHARED, found->second);
  if (c.dynamicSmemBytes > limit) return cudaErrorInvalidValue;
  const unsigned threads = c.blockDim.x * c.blockDim.y * c.blockDim.z;
  const bool empty = !threads || !c.gridDim.x || !c.gridDim.y || !c.gridDim.z;
  if (empty || threads > MOST_THREADS || c.blockDim.z > 64 || c.gridDim.x > 0x7FFFFFFFu ||
      c.gridDim.y > MOST_BLOCKS_YZ || c.gridDim.z > MOST_BLOCKS_YZ)
    return cudaErrorInvalidConfiguration;
  return cudaSuccess;
}

// "softmax<256>" of the demangled "void ns::softmax<256>(float const*, int)", where the symbol can be seen.
std::string emulator_name(const void* kernel) {
  Dl_info info;
  if (!dladdr(kernel, &info) || !info.dli_sname || info.dli_saddr != kernel) return "kernel";
  int status = 0;
  char* demangled = abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, &status);
  std::string name = status == 0 ? demangled : info.dli_sname;
  std::free(demangled);
  // Up to the bracket that opens the parameters, the first outside <>.
  int depth = 0;
  for (size_t i = 0; i < name.size(); ++i) {
    if (name[i] == '<') ++depth;
    if (name[i] == '>') --depth;
    if (name[i] == '(' && depth == 0 && name.compare(i, 11, "(anonymous ") != 0) {
      name.resize(i);
      break;
    }
  }
  if (name.rfind("void ", 0) == 0) name.erase(0, 5);
  return name;
}
