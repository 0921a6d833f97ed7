// How Python describes calls that draw random numbers: what the bindings of the CPU's kernels and of CUDA's share. A
// function says which of its arguments (a bit each, by their order) lie otherwise than its kernel reads: nothing was
// done then, and the caller passes copies of those.
#pragma once
#include <algorithm>
#include <array>
#include <optional>
#include <string>
#include <tuple>

#include "onepass/denoise.h"
#include "onepass/gumbel.h"
#include "onepass/latent.h"
#include "onepass/reparam.h"
#include "onepass/rng.h"
#include "tensors.h"

namespace onepass::bindings {

using Misfits = uint64_t;

inline Misfits misfit(bool fits, int argument) { return fits ? 0 : Misfits{1} << argument; }

// A number, or values: one for all rows, or one each.
inline KeyPart key_part(int64_t value, const Array& values) {
  if (!values) return {value, nullptr, 0};
  return {0, values.as<const int64_t>(), values.dims() ? values.stride(0) : 0};
}

// (seed, seeds, stream, streams, offset, offsets): numbers, and in their place tensors or None.
class KeyArgument {
 public:
  KeyArgument() = default;
  KeyArgument(const KeyArgument&) = delete;
  KeyArgument& operator=(const KeyArgument&) = delete;

  bool read(PyObject* object) {
    if (!PyTuple_CheckExact(object) || PyTuple_GET_SIZE(object) != 6) return false;
    for (int i = 0; i < 3; ++i) {
      PyObject* number = PyTuple_GET_ITEM(object, 2 * i);
      if (!PyLong_Check(number) || !values_[i].read(PyTuple_GET_ITEM(object, 2 * i + 1))) return false;
      numbers_[i] = PyLong_AsLongLong(number);
      if (numbers_[i] == -1 && PyErr_Occurred()) throw py::error_already_set();
    }
    return true;
  }

  Keys keys() const {
    return {key_part(numbers_[0], values_[0]), key_part(numbers_[1], values_[1]), key_part(numbers_[2], values_[2])};
  }
  bool per_row() const {
    return std::any_of(values_.begin(), values_.end(), [](const Array& x) { return x && x.dims() > 0; });
  }

 private:
  std::array<int64_t, 3> numbers_{};
  std::array<Array, 3> values_;
};

// The rows of dim 0, and the elements of each; a scalar is one row.
inline int64_t rows_of(const Array& x) { return x.dims() ? x.size(0) : 1; }
inline int64_t row_length(const Array& x) {
  int64_t length = 1;
  for (int dim = 1; dim < x.dims(); ++dim) length *= x.size(dim);
  return length;
}

inline RowsIn rows_in(const Array& x) { return {x.as<const void>(), x && x.dims() ? x.stride(0) : 0}; }

// run(distribution, keys, rows, length, dtype, out, target): the target is a number of threads, or a device and stream.
template <class Target, class Run>
void def_rng_fill(py::module_& m, Run run) {
  m.def("rng_fill", [run](int distribution, const KeyArgument& key, const Array& out, const Target& target) {
    const auto kind = static_cast<Distribution>(distribution);
    const int64_t rows = key.per_row() ? rows_of(out) : 1, elements = rows_of(out) * row_length(out);
    run(kind, key.keys(), rows, elements / rows, kind == Distribution::bits ? DType::f32 : out.dtype(), out.as<void>(),
        target);
  });
}

inline Misfits describe(const Array& mean, const Array& logvar, const Array& noise, const KeyArgument& key,
                        Reparam& p) {
  p = {rows_of(mean), row_length(mean),        mean.dtype(),
       rows_in(mean), rows_in(logvar),         rows_in(noise),
       key.keys(),    key.per_row() && !noise, 0};
  return misfit(mean.in_rows(), 0) | misfit(logvar.in_rows(), 1) | misfit(noise.in_rows(), 2);
}

// As def_rng_fill; `tile` elements of a row have a partial sum of their own.
template <class Target, class Forward, class Backward>
void def_reparam(py::module_& m, int64_t tile, Forward forward, Backward backward) {
  m.def("reparam_forward",
        [=](const Array& mean, const Array& logvar, const Array& noise, const KeyArgument& key, const Array& z,
            const Array& kl, const Target& target) -> Misfits {
          Reparam p;
          if (const Misfits odd = describe(mean, logvar, noise, key, p)) return odd;
          const int64_t partials = kl && p.length > tile ? p.rows * ((p.length + tile - 1) / tile) : 0;
          const Scratch partial(partials * static_cast<int64_t>(sizeof(double)), mean);
          forward(p, z.as<void>(), kl.as<float>(), static_cast<double*>(partial.data()), target);
          return 0;
        });
  m.def("reparam_backward",
        [=](const Array& mean, const Array& logvar, const Array& noise, const KeyArgument& key, const Array& grad_z,
            const Array& grad_kl, const Array& grad_mean, const Array& grad_logvar, const Array& grad_noise,
            const Target& target) -> Misfits {
          Reparam p;
          const Misfits odd =
              describe(mean, logvar, noise, key, p) | misfit(grad_z.in_rows(), 4) | misfit(grad_kl.contiguous(), 5);
          if (!odd)
            backward(p, rows_in(grad_z), grad_kl.as<const float>(), grad_mean.as<void>(), grad_logvar.as<void>(),
                     grad_noise.as<void>(), target);
          return odd;
        });
}

// Tensors [B, ...] of one shape as rows of segments: the longest pieces that lie together in all of them.
class Operands {
 public:
  // One of two halves along a dim, or where that is negative the whole; rows are dim `rows`.
  struct Part {
    int rows = 0, halved = -1;
    bool second = false;
  };

  Operands(const Array& like, int halved) : rows(rows_of(like)), length(row_length(like)), run_(0) {
    if (halved == 0) rows /= 2;
    if (halved > 0) length /= 2;
    run_ = length;
  }

  int64_t rows, length;
  int64_t run() const { return run_; }

  void share(const Array& x, Part part) {
    if (const auto found = x ? lies(x, part) : std::nullopt) run_ = std::min(run_, found->run);
  }
  // As share, of what is written where it lies.
  void share_result(const Array& x, Part part) {
    if (const auto found = lies(x, part); found && found->run < length) run_ = found->run;
  }

  // Whether x lies as the kernel reads it, and where.
  template <class Of>
  bool locate(const Array& x, Part part, Of& segments) const {
    segments = {nullptr, 0, 0};
    if (!x) return true;
    const auto found = lies(x, part);
    if (!found || (found->run != run_ && found->run != length)) return false;
    const int64_t skipped = part.second ? x.size(part.halved) / 2 * x.stride(part.halved) : 0;
    segments = {x.as<char>() + skipped * x.raw().bits / 8, x.dims() ? x.stride(part.rows) : 0,
                found->run == length ? run_ : found->segment};
    return true;
  }

 private:
  struct Lies {
    int64_t run, segment;  // elements in one piece, and from a piece to the next
  };

  static std::optional<Lies> lies(const Array& x, Part part) {
    int64_t run = 1, segment = 0, pieces = 1;
    for (int dim = x.dims() - 1; dim > part.rows; --dim) {
      const int64_t size = dim == part.halved ? x.size(dim) / 2 : x.size(dim), step = x.stride(dim);
      if (size == 1) continue;
      if (pieces == 1 && step == run) {
        run *= size;
        continue;
      }
      if (pieces == 1) segment = step;
      if (step != segment * pieces) return std::nullopt;
      pieces *= size;
    }
    return Lies{run, pieces == 1 ? run : segment};
  }

  int64_t run_;
};

// (low, high, samples, antithetic, terms, beta, free_bits); samples 0: no dim of samples
using LatentOptions = std::tuple<float, float, int64_t, bool, int, float, float>;

// The tensors of a call, the parts that its kernel reads, and the call itself.
struct LatentCall {
  Operands operands;
  Operands::Part mean, logvar, drawn;
  Latent p{};

  LatentCall(const Array& mean_of, const Array& logvar_of, int chunk_dim, const LatentOptions& options)
      : operands(mean_of, logvar_of ? -1 : chunk_dim) {
    if (!logvar_of) {
      mean.halved = logvar.halved = chunk_dim;
      logvar.second = true;
    }
    drawn.rows = std::get<2>(options) > 0;
    int terms = 0;
    std::tie(p.clamp_low, p.clamp_high, p.samples, p.antithetic, terms, p.beta, p.free_bits) = options;
    p.samples = std::max<int64_t>(p.samples, 1);
    p.terms = static_cast<LatentTerms>(terms);
  }

  void share(const Array& mean_of, const Array& logvar_of, const Array& noise, const Array& prior_mean,
             const Array& prior_logvar) {
    operands.share(mean_of, mean);
    operands.share(logvar_of, {});
    operands.share(noise, drawn);
    operands.share(prior_mean, {});
    operands.share(prior_logvar, {});
  }

  Misfits describe(const Array& mean_of, const Array& logvar_of, const Array& noise, const KeyArgument& key,
                   const Array& prior_mean, const Array& prior_logvar) {
    p.rows = operands.rows;
    p.run = operands.run();
    p.segments = operands.length / p.run;
    p.dtype = mean_of.dtype();
    p.noise_draw = noise && drawn.rows ? noise.stride(0) : 0;
    p.keys = key.keys();
    p.keys_per_row = key.per_row() && !noise;
    const Array& of_logvar = logvar_of ? logvar_of : mean_of;
    return misfit(operands.locate(mean_of, mean, p.mean), 0) |
           misfit(operands.locate(of_logvar, logvar, p.logvar), logvar_of ? 1 : 0) |
           misfit(operands.locate(noise, drawn, p.noise), 2) |
           misfit(operands.locate(prior_mean, {}, p.prior_mean), 4) |
           misfit(operands.locate(prior_logvar, {}, p.prior_logvar), 5);
  }
};

// As def_rng_fill.
template <class Target, class Forward, class Backward>
void def_latent(py::module_& m, Forward forward, Backward backward) {
  m.def("latent_forward",
        [=](const Array& mean, const Array& logvar, const Array& noise, const KeyArgument& key, const Array& prior_mean,
            const Array& prior_logvar, int chunk_dim, const LatentOptions& options, const Array& z, const Array& first,
            const Array& second, const Target& target) -> Misfits {
          LatentCall call(mean, logvar, chunk_dim, options);
          call.share(mean, logvar, noise, prior_mean, prior_logvar);
          if (const Misfits odd = call.describe(mean, logvar, noise, key, prior_mean, prior_logvar)) return odd;
          Latent& p = call.p;
          const int64_t sums = p.terms == LatentTerms::row ? 1 : p.terms == LatentTerms::weights ? 2 * p.samples : 0;
          const int64_t tiles = p.length() > LATENT_TILE ? (p.length() + LATENT_TILE - 1) / LATENT_TILE : 0;
          const Scratch partial(sums * p.rows * tiles * static_cast<int64_t>(sizeof(double)), mean);
          forward(p,
                  LatentOut{z.as<void>(), first.empty() ? nullptr : first.as<float>(),
                            second.empty() ? nullptr : second.as<float>(), static_cast<double*>(partial.data())},
                  target);
          return 0;
        });
  // Gradients are written where they lie: that of a tensor of both halves in its halves.
  m.def("latent_backward",
        [=](const Array& mean, const Array& logvar, const Array& noise, const KeyArgument& key, const Array& prior_mean,
            const Array& prior_logvar, int chunk_dim, const LatentOptions& options, const Array& grad_z,
            const Array& grad_first, const Array& grad_second, const Array& to_mean, const Array& to_logvar,
            const Array& to_prior_mean, const Array& to_prior_logvar, const Array& to_noise,
            const Target& target) -> Misfits {
          LatentCall call(mean, logvar, chunk_dim, options);
          call.share(mean, logvar, noise, prior_mean, prior_logvar);
          call.operands.share(grad_z, call.drawn);
          call.operands.share_result(to_mean, call.mean);
          LatentGradIn in{};
          LatentGradOut out{};
          in.z_sample = grad_z && call.drawn.rows ? grad_z.stride(0) : 0;
          in.first = grad_first.as<const float>();
          in.second = grad_second.as<const float>();
          out.noise = to_noise.as<void>();
          const Misfits odd = call.describe(mean, logvar, noise, key, prior_mean, prior_logvar) |
                              misfit(call.operands.locate(grad_z, call.drawn, in.z), 8) |
                              misfit(grad_first.contiguous(), 9) | misfit(grad_second.contiguous(), 10);
          if (odd) return odd;
          call.operands.locate(to_mean, call.mean, out.mean);
          call.operands.locate(logvar ? to_logvar : to_mean, call.logvar, out.logvar);
          call.operands.locate(to_prior_mean, {}, out.prior_mean);
          call.operands.locate(to_prior_logvar, {}, out.prior_logvar);
          backward(call.p, in, out, target);
          return 0;
        });
}

// As def_rng_fill, of contiguous tensors; `grad` None: forward.
template <class Target, class Run>
void def_gumbel_softmax(py::module_& m, Run run) {
  m.def("gumbel_softmax", [run](const Array& logits, const Array& grad, const KeyArgument& key, float tau, bool hard,
                                const Array& out, const Target& target) {
    const int64_t n = logits.size(-1), groups = rows_of(logits) * row_length(logits) / n;
    run(GumbelSoftmax{groups, n, key.per_row() ? groups / rows_of(logits) : groups, logits.dtype(),
                      logits.as<const void>(), grad.as<const void>(), key.keys(), tau, hard, out.as<void>(), nullptr,
                      0},
        logits, target);
  });
}

// As def_rng_fill; run(call, target) returns the first row whose step is not in the table, or -1. The mask is given
// with the elements from row to row and its period.
template <class Target, class Run>
void def_denoise_step(py::module_& m, Run run) {
  m.def("denoise_step",
        [run](const Array& sample, const Array& model, const Array& cond, const Array& noise, const Array& known,
              const Array& mask, int64_t mask_step, int64_t period, const Array& table, int64_t step,
              const Array& steps, float guidance, const Array& guidances, int64_t seed, const Array& seeds,
              const Array& state, const Array& out, const Target& target) -> Misfits {
          const Misfits odd = misfit(sample.in_rows(), 0) | misfit(model.in_rows(), 1) | misfit(cond.in_rows(), 2) |
                              misfit(noise.in_rows(), 3) | misfit(known.in_rows(), 4) | misfit(table.contiguous(), 8);
          if (odd) return odd;
          const Denoise p{
              rows_of(sample),
              row_length(sample),
              sample.dtype(),
              model.dtype(),
              rows_in(sample),
              rows_in(model),
              rows_in(cond),
              rows_in(noise),
              rows_in(known),
              {mask.as<const void>(), mask && !mask.is_bool(), mask_step, period},
              {table.as<const double>(), table.size(0), table.size(1) - COL_HISTORY},
              key_part(step, steps),
              {guidance, guidances.as<const float>(), guidances && guidances.dims() ? guidances.stride(0) : 0},
              key_part(seed, seeds),
              seeds && seeds.dims() > 0,
              state.as<void>(),
              {out.as<void>(), out.stride(0)},
              0};
          const int64_t bad = run(p, target);
          if (bad >= 0)
            throw py::value_error("step of row " + std::to_string(bad) + " is " +
                                  std::to_string(static_cast<int64_t>(p.step.at(bad))) + ", expected 0 .. " +
                                  std::to_string(p.table.rows - 1) + ", a row of the plan");
          return 0;
        });
}

}  // namespace onepass::bindings

namespace pybind11::detail {

template <>
struct type_caster<onepass::bindings::KeyArgument> {
  PYBIND11_TYPE_CASTER(onepass::bindings::KeyArgument, const_name("tuple"));
  bool load(handle source, bool) { return value.read(source.ptr()); }
};

}  // namespace pybind11::detail
