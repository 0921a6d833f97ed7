// How Python describes a call to a kernel: what the bindings of the CPU's kernels and of CUDA's share. Arguments arrive
// checked; pointers are integers.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <tuple>
#include <utility>

#include "onepass/attention.h"
#include "onepass/denoise.h"
#include "onepass/reparam.h"
#include "onepass/rng.h"
#include "onepass/volrend.h"

namespace onepass::bindings {

namespace py = pybind11;

using Pointer = uintptr_t;  // tensor.data_ptr(); 0 where there is no tensor

template <class T>
T* at(Pointer p) {
  return reinterpret_cast<T*>(p);
}

// (value, pointer to values or 0, step): one part of a random key.
using KeyArgument = std::tuple<int64_t, Pointer, int64_t>;

inline KeyPart key_part(const KeyArgument& a) {
  return {std::get<0>(a), at<const int64_t>(std::get<1>(a)), std::get<2>(a)};
}

// Of seed, stream and offset; None where no number is drawn.
using KeysArgument = std::optional<std::tuple<KeyArgument, KeyArgument, KeyArgument>>;

inline Keys keys(const KeysArgument& a) {
  if (!a) return {};
  const auto& [seed, stream, offset] = *a;
  return {key_part(seed), key_part(stream), key_part(offset)};
}

// (pointer or 0, elements from a row to the next)
using RowsArgument = std::pair<Pointer, int64_t>;

inline RowsIn rows_in(const RowsArgument& a) { return {at<const void>(a.first), a.second}; }

// Pointers and steps one by one: unpacking tuples costs more than the rest of the call.
inline Reparam reparam(int64_t rows, int64_t length, int dtype, Pointer mean, int64_t mean_step, Pointer logvar,
                       int64_t logvar_step, Pointer noise, int64_t noise_step, const KeysArgument& key,
                       bool keys_per_row, int num_threads) {
  return {rows,
          length,
          static_cast<DType>(dtype),
          {at<const void>(mean), mean_step},
          {at<const void>(logvar), logvar_step},
          {at<const void>(noise), noise_step},
          keys(key),
          keys_per_row,
          num_threads};
}

// (pointer, elements from a batch row, a token and a head to the next)
using HeadsArgument = std::tuple<Pointer, int64_t, int64_t, int64_t>;

inline Heads heads(const HeadsArgument& a) {
  return {at<const void>(std::get<0>(a)), std::get<1>(a), std::get<2>(a), std::get<3>(a)};
}

// (pointer or 0, elements from a ray to the next, dtype)
using SamplesArgument = std::tuple<Pointer, int64_t, int>;

inline Samples samples(const SamplesArgument& a) {
  return {at<const void>(std::get<0>(a)), std::get<1>(a), static_cast<DType>(std::get<2>(a))};
}

// run(call, target): the target is a number of threads, or a device and stream. Returns the first row of the batch
// whose step is not a row of the table, or -1.
template <class Target, class Run>
void def_denoise_step(py::module_& m, Run run) {
  m.def("denoise_step", [run](int64_t batch, int64_t length, int dtype, int model_dtype, RowsArgument sample,
                              RowsArgument model, RowsArgument cond, RowsArgument noise, RowsArgument known,
                              std::tuple<Pointer, bool, int64_t, int64_t> mask,
                              std::tuple<Pointer, int64_t, int64_t> table, const KeyArgument& step,
                              std::tuple<double, Pointer, int64_t> guidance, const KeyArgument& seed, bool keys_per_row,
                              Pointer state, RowsArgument out, const Target& target) {
    const Denoise p{
        batch,
        length,
        static_cast<DType>(dtype),
        static_cast<DType>(model_dtype),
        rows_in(sample),
        rows_in(model),
        rows_in(cond),
        rows_in(noise),
        rows_in(known),
        {at<const void>(std::get<0>(mask)), std::get<1>(mask), std::get<2>(mask), std::get<3>(mask)},
        {at<const double>(std::get<0>(table)), std::get<1>(table), std::get<2>(table)},
        key_part(step),
        {static_cast<float>(std::get<0>(guidance)), at<const float>(std::get<1>(guidance)), std::get<2>(guidance)},
        key_part(seed),
        keys_per_row,
        at<void>(state),
        {at<void>(out.first), out.second},
        0};
    return run(p, target);
  });
}

// As def_denoise_step.
template <class Target, class Run>
void def_kvcache_append(py::module_& m, Run run) {
  m.def("kvcache_append",
        [run](std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t> sizes, int dtype, const HeadsArgument& k,
              const HeadsArgument& v, const HeadsArgument& k_cache, const HeadsArgument& v_cache, const Cache& cache,
              const Rotary& rotary, const Target& target) {
          const auto [batch, kv_heads, head_dim, value_dim, tokens, steps] = sizes;
          run(Append{batch, kv_heads, head_dim, value_dim, tokens, steps, static_cast<DType>(dtype), heads(k), heads(v),
                     heads(k_cache), heads(v_cache), cache, rotary, 0},
              target);
        });
}

// Descriptions with many parts are objects; a module's own, so that the block emulator can be loaded beside onepass._C.
inline void bind_attention_call(py::module_& m) {
  py::class_<Cache>(m, "Cache", py::module_local())
      .def(py::init([](Pointer seqlens, int64_t keys, int64_t appended, int64_t slots, int64_t pages,
                       Pointer block_table, int64_t blocks, Pointer batch_idx, Pointer leftpad, Pointer cu_seqlens) {
        return Cache{at<const int32_t>(seqlens),
                     keys,
                     appended,
                     slots,
                     pages,
                     at<const int32_t>(block_table),
                     blocks,
                     at<const int32_t>(batch_idx),
                     at<const int32_t>(leftpad),
                     at<const int32_t>(cu_seqlens)};
      }));
  py::class_<Rotary>(m, "Rotary", py::module_local())
      .def(py::init([](Pointer cos, Pointer sin, int64_t positions, int64_t half, bool interleaved) {
        return Rotary{at<const float>(cos), at<const float>(sin), positions, half, interleaved};
      }));
  py::class_<Attention>(m, "Attention", py::module_local())
      .def(py::init([](std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t> sizes, int dtype,
                       const HeadsArgument& q, const HeadsArgument& k, const HeadsArgument& v, const HeadsArgument& out,
                       Pointer lse, const Cache& cache, const Rotary& rotary, bool rotary_ordered, int64_t window_left,
                       int64_t window_right, float softcap, float scale, Pointer slopes, int64_t slopes_batch,
                       Pointer sinks, int mask_kind, Pointer mask,
                       std::tuple<int64_t, int64_t, int64_t, int64_t> mask_steps, Pointer tree, int num_threads) {
        const auto [batch, n_heads, kv_heads, head_dim, value_dim, queries, tokens] = sizes;
        const auto [mask_batch, mask_head, mask_row, mask_key] = mask_steps;
        return Attention{batch,
                         n_heads,
                         kv_heads,
                         head_dim,
                         value_dim,
                         queries,
                         tokens,
                         static_cast<DType>(dtype),
                         heads(q),
                         heads(k),
                         heads(v),
                         heads(out),
                         at<float>(lse),
                         cache,
                         rotary,
                         rotary_ordered,
                         window_left,
                         window_right,
                         softcap,
                         scale,
                         at<const float>(slopes),
                         slopes_batch,
                         at<const float>(sinks),
                         ScoreMask{static_cast<MaskKind>(mask_kind), at<const void>(mask), mask_batch, mask_head,
                                   mask_row, mask_key},
                         at<const uint8_t>(tree),
                         num_threads};
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

inline void bind_calls(py::module_& m) {
  m.attr("KL_TILE") = KL_TILE;
  m.attr("DENOISE_COLUMNS") = static_cast<int>(COL_HISTORY);
  m.attr("MAX_HISTORY") = MAX_HISTORY;
  bind_attention_call(m);
  bind_composite_call(m);
}

// The functions of the CUDA kernels (bindings_cuda.cpp), named as the CPU's, with (device, stream) for num_threads.
void bind_cuda(py::module_ m);

}  // namespace onepass::bindings
