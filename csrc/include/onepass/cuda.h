// What the CUDA runtime says of this machine. Needs no driver to link or to load.
#pragma once
#include <string>
#include <vector>

namespace onepass {

// One line a device, "name, sm_XY, N SMs"; empty without a device or driver. Throws std::runtime_error on any other
// error.
std::vector<std::string> cuda_devices();

}  // namespace onepass
