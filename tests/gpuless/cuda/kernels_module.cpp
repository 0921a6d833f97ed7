// What onepass._C is on a device, with the block emulator for one: engine/_native takes it in its place.
#include "bindings.h"
#include "emulator.h"

PYBIND11_MODULE(emulated_kernels, m) {
  onepass::bindings::bind_calls(m);
  onepass::bindings::bind_cuda(m.def_submodule("cuda"));
  m.attr("has_cuda") = true;
  m.def("set_order", [](int order, uint64_t seed) { emulator::set_order(static_cast<emulator::Order>(order), seed); });
}
