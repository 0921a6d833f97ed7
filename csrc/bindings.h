// How Python describes a call to a kernel: what the bindings of the CPU's kernels and of CUDA's share. Arguments arrive
// checked; pointers are integers.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <tuple>
#include <utility>

#include "bindings_interpolate.h"
#include "onepass/attention.h"
#include "onepass/attention_merge.h"
#include "onepass/volrend.h"

namespace onepass::bindings {

namespace py = pybind11;

using Pointer = uintptr_t;  // tensor.data_ptr(); 0 where there is no tensor

template <class T>
T* at(Pointer p) {
  return reinterpret_cast<T*>(p);
}

// Of [B, S, H, D], or of ragged rows [total, H, D].
inline Heads heads(const Array& x) {
  return {x.as<const void>(), x.dims() == 4 ? x.stride(0) : 0, x.stride(-3), x.stride(-2)};
}

inline Rotary rotary(const Array& cos, const Array& sin, bool interleaved) {
  if (!cos) return {nullptr, nullptr, 0, 0, interleaved};
  return {cos.as<const float>(), sin.as<const float>(), cos.size(0), cos.size(1), interleaved};
}

// Over [B, H, Sq, Sk], any of which may be 1 or, the first ones, missing.
inline ScoreMask score_mask(const Array& x) {
  if (!x) return {MaskKind::none, nullptr, 0, 0, 0, 0};
  const auto step = [&](int dim) {
    const int own = dim + x.dims() - 4;
    return own < 0 || x.size(own) == 1 ? 0 : x.stride(own);
  };
  return {x.is_bool() ? MaskKind::boolean : MaskKind::additive, x.as<const void>(), step(0), step(1), step(2), step(3)};
}

// (pointer or 0, elements from a ray to the next, dtype)
using SamplesArgument = std::tuple<Pointer, int64_t, int>;

inline Samples samples(const SamplesArgument& a) {
  return {at<const void>(std::get<0>(a)), std::get<1>(a), static_cast<DType>(std::get<2>(a))};
}

// Per token where there are three dims: [pages, slots, Hkv]; else [B, Hkv].
inline Scales scales(const Array& x) {
  if (!x) return {};
  const bool per_token = x.dims() == 3;
  return {x.as<float>(), x.stride(0), per_token ? x.stride(1) : 0, x.stride(-1), per_token};
}

// As def_rng_fill.
template <class Target, class Run>
void def_kvcache_append(py::module_& m, Run run) {
  m.def("kvcache_append", [run](const Array& k, const Array& v, const Array& k_cache, const Array& v_cache,
                                const Array& seqlens, const Array& block_table, const Array& batch_idx,
                                const Array& cu_seqlens, const Array& cos, const Array& sin, bool interleaved,
                                int codes, const Array& k_scale, const Array& v_scale, const Target& target) {
    const int64_t steps = cu_seqlens ? k.size(0) : k.size(1);
    const Cache cache{seqlens.as<const int32_t>(),
                      0,
                      cu_seqlens ? -1 : steps,
                      k_cache.size(1),
                      k_cache.size(0),
                      block_table.as<const int32_t>(),
                      block_table ? block_table.size(1) : 0,
                      batch_idx.as<const int32_t>(),
                      nullptr,
                      cu_seqlens.as<const int32_t>()};
    run(Append{seqlens.size(0), k.size(-2), k.size(-1), v.size(-1), k.size(0), steps, k.dtype(), heads(k), heads(v),
               heads(k_cache), heads(v_cache), cache, rotary(cos, sin, interleaved), 0, static_cast<Codes>(codes),
               scales(k_scale), scales(v_scale)},
        target);
  });
}

// outs [N, B, S, H, D], lses [N, B, H, S]
inline Merge merge(const Array& outs, const Array& lses, const Array& sinks) {
  return {outs.size(0),
          outs.size(1),
          outs.size(2),
          outs.size(3),
          outs.size(4),
          outs.dtype(),
          {outs.as<const void>(), outs.stride(1), outs.stride(2), outs.stride(3)},
          outs.stride(0),
          lses.as<const float>(),
          lses.stride(0),
          lses.stride(1),
          lses.stride(2),
          lses.stride(3),
          sinks.as<const float>(),
          0};
}

// As def_rng_fill.
template <class Target, class Forward, class Backward>
void def_merge_attention(py::module_& m, Forward forward, Backward backward) {
  m.def("merge_attention", [forward](const Array& outs, const Array& lses, const Array& sinks, const Array& out,
                                     const Array& lse, const Target& target) {
    forward(merge(outs, lses, sinks), out.as<void>(), lse.as<float>(), target);
  });
  m.def("merge_attention_backward", [backward](const Array& outs, const Array& lses, const Array& sinks,
                                               const Array& grad_out, const Array& grad_lse, const Array& douts,
                                               const Array& dlses, const Array& dsinks, const Target& target) {
    backward(MergeBackward{merge(outs, lses, sinks), grad_out.as<const void>(), grad_lse.as<const float>(),
                           douts.as<void>(), dlses.as<float>(), dsinks.as<float>()},
             target);
  });
}

// A call of many parts is an object; a module's own, so that the block emulator can be loaded beside onepass._C.
inline void bind_attention_call(py::module_& m) {
  py::class_<Attention>(m, "Attention", py::module_local())
      .def(py::init([](const Array& q, const Array& k, const Array& v, const Array& out, const Array& lse,
                       int64_t queries, const Array& seqlens, int64_t appended, const Array& block_table,
                       const Array& batch_idx, const Array& leftpad, const Array& cu_seqlens, const Array& cos,
                       const Array& sin, bool interleaved, bool rotary_ordered, bool causal, int64_t window_left,
                       int64_t window_right, float softcap, float scale, const Array& slopes, const Array& sinks,
                       const Array& mask, const Array& tree, int codes, const Array& k_scale, const Array& v_scale,
                       int num_threads) {
        const int64_t n_heads = q.size(-2);
        return Attention{
            seqlens ? seqlens.size(0) : q.size(0),
            n_heads,
            k.size(-2),
            q.size(-1),
            v.size(-1),
            queries,
            q.size(0),
            q.dtype(),
            heads(q),
            heads(k),
            heads(v),
            heads(out),
            lse.as<float>(),
            Cache{seqlens.as<const int32_t>(), seqlens ? 0 : k.size(1), appended, k.size(1), k.size(0),
                  block_table.as<const int32_t>(), block_table ? block_table.size(1) : 0, batch_idx.as<const int32_t>(),
                  leftpad.as<const int32_t>(), cu_seqlens.as<const int32_t>()},
            rotary(cos, sin, interleaved),
            rotary_ordered,
            window_left,
            causal ? 0 : window_right,
            softcap,
            scale,
            slopes.as<const float>(),
            slopes && slopes.dims() == 2 ? n_heads : 0,
            sinks.as<const float>(),
            score_mask(mask),
            tree.as<const uint8_t>(),
            num_threads,
            static_cast<Codes>(codes),
            scales(k_scale),
            scales(v_scale)};
      }));
}

inline void bind_composite_call(py::module_& m) {
  py::class_<Composite>(m, "Composite", py::module_local())
      .def(py::init([](int64_t n_rays, int64_t n_samples, int64_t n_channels, Pointer ray_offsets,
                       const SamplesArgument& sigmas, const SamplesArgument& alphas, const SamplesArgument& features,
                       const SamplesArgument& t_starts, const SamplesArgument& t_ends, Pointer background,
                       int64_t background_step, Pointer prefix_trans, float early_stop_eps, int depth, int num_threads,
                       int tasks, Pointer scratch) {
        return Composite{n_rays,
                         n_samples,
                         n_channels,
                         at<const int64_t>(ray_offsets),
                         samples(sigmas),
                         samples(alphas),
                         samples(features),
                         samples(t_starts),
                         samples(t_ends),
                         at<const float>(background),
                         background_step,
                         at<const float>(prefix_trans),
                         early_stop_eps,
                         static_cast<Depth>(depth),
                         num_threads,
                         tasks,
                         at<float>(scratch)};
      }));
}

// Whether nothing points outside the cache, where that is quickly told: of lengths in host memory, one after another;
// that no two rows append to one is left to Python.
inline bool cache_fits(const Array& cache, const Array& seqlens, int64_t appended, const Array& block_table,
                       const Array& batch_idx, const Array& leftpad, const Array& cu_seqlens, int64_t queries,
                       int64_t tokens, int64_t positions) {
  for (const Array* x : {&seqlens, &block_table, &batch_idx, &leftpad, &cu_seqlens})
    if (*x && !(x->on_host() && x->contiguous())) return false;
  if (batch_idx && appended) return false;
  const Cache described{seqlens.as<const int32_t>(),
                        0,
                        appended,
                        cache.size(1),
                        cache.size(0),
                        block_table.as<const int32_t>(),
                        block_table ? block_table.size(1) : 0,
                        batch_idx.as<const int32_t>(),
                        leftpad.as<const int32_t>(),
                        cu_seqlens.as<const int32_t>()};
  const float table = 0;
  const Rotary rotary{positions < 0 ? nullptr : &table, nullptr, positions, 0, false};
  return !cache_fault(described, seqlens.size(0), queries, tokens, rotary);
}

inline void bind_calls(py::module_& m) {
  Torch::get().load(true);
  m.def("read_by_attributes", [](bool on) { Torch::get().load(!on); });
  static PyMethodDef signature_method = {
      "signature", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(signature)), METH_FASTCALL, nullptr};
  PyModule_AddObject(m.ptr(), "signature", PyCFunction_New(&signature_method, nullptr));
  m.def("cache_fits", cache_fits);
  bind_attention_call(m);
  bind_composite_call(m);
}

// The functions of the CUDA kernels (bindings_cuda.cpp), named as the CPU's, with (device, stream) for num_threads.
void bind_cuda(py::module_ m);

}  // namespace onepass::bindings
