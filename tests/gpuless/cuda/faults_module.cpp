#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "emulator.h"
#include "faults.h"
#include "fragments.h"

namespace py = pybind11;

namespace {

template <class T>
T* at(uintptr_t p) {
  return reinterpret_cast<T*>(p);
}

}  // namespace

PYBIND11_MODULE(emulated_faults, m) {
  m.def("set_order", [](int order, uint64_t seed) { emulator::set_order(static_cast<emulator::Order>(order), seed); });
  m.def("names", faults::names);
  m.def("run", faults::run);
  m.def("call_warps", faults::call_warps);
  m.def("count", [](unsigned blocks, unsigned threads) {
    float sum = 0;
    const auto counts = faults::count(blocks, threads, sum);
    return py::make_tuple(counts, sum);
  });
  m.def("multiply", [](uintptr_t a, uintptr_t b, uintptr_t d, bool bf16, bool transposed) {
    return multiply_fragments(at<const uint16_t>(a), at<const uint16_t>(b), at<float>(d), bf16, transposed);
  });
  m.def("narrow", [](uintptr_t in, uintptr_t out, int64_t n, bool bf16) {
    faults::narrow(at<const float>(in), at<uint16_t>(out), n, bf16);
  });
  m.def("widen", [](uintptr_t in, uintptr_t out, int64_t n, bool bf16) {
    faults::widen(at<const uint16_t>(in), at<float>(out), n, bf16);
  });
}
