// How Python describes paths between vectors: what the bindings of the CPU's kernels and of CUDA's share, as
// bindings_sampling.h.
#pragma once
#include "bindings_sampling.h"
#include "onepass/interpolate.h"

namespace onepass::bindings {

// Of tensors [rows, groups, length]; weights float32, [] or [rows].
inline Misfits describe(const Array& start, const Array& end, const Array& grad, float weight, const Array& weights,
                        bool arc, Interpolate& p) {
  p = {start.size(0),
       start.size(1),
       start.size(2),
       start.dtype(),
       rows_in(start),
       rows_in(end),
       rows_in(grad),
       weight,
       weights.as<const float>(),
       weights && weights.dims() ? weights.stride(0) : 0,
       arc,
       0};
  return misfit(start.in_rows(), 0) | misfit(end.in_rows(), 1) | misfit(grad.in_rows(), 2);
}

// As def_rng_fill; partial(call) is how many bytes the sums of a call's vectors take.
template <class Target, class Partial, class Forward, class Backward>
void def_interpolate(py::module_& m, Partial partial, Forward forward, Backward backward) {
  m.def("interpolate_forward",
        [=](const Array& start, const Array& end, float weight, const Array& weights, bool arc, const Array& out,
            const Target& target) -> Misfits {
          Interpolate p;
          if (const Misfits odd = describe(start, end, Array(), weight, weights, arc, p)) return odd;
          const Scratch sums(arc ? partial(p) : 0, start);
          forward(p, out.as<void>(), sums.data(), target);
          return 0;
        });
  m.def("interpolate_backward",
        [=](const Array& start, const Array& end, const Array& grad, float weight, const Array& weights, bool arc,
            const Array& to_start, const Array& to_end, const Array& to_weights, const Target& target) -> Misfits {
          Interpolate p;
          if (const Misfits odd = describe(start, end, grad, weight, weights, arc, p)) return odd;
          const Scratch sums(arc || to_weights ? partial(p) : 0, start);
          const Scratch vectors(to_weights ? p.vectors() * static_cast<int64_t>(sizeof(double)) : 0, start);
          const InterpolateGradOut out{to_start.as<void>(), to_end.as<void>(), to_weights.as<float>(),
                                       static_cast<double*>(vectors.data())};
          backward(p, out, sums.data(), target);
          return 0;
        });
}

}  // namespace onepass::bindings
