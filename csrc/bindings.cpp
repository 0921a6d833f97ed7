// The only file that knows Python. Arguments arrive checked; pointers are integers; the GIL is released while a kernel
// runs. The instruction set is chosen once, at load: the best this CPU has, or the one ONEPASS_CPU_ISA names.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdlib>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "onepass/attention.h"
#include "onepass/bandwidth.h"
#include "onepass/denoise.h"
#include "onepass/reparam.h"
#include "onepass/rng.h"
#include "onepass/volrend.h"
#ifdef ONEPASS_WITH_CUDA
#include "onepass/cuda.h"
#endif

namespace py = pybind11;
using namespace onepass;

namespace {

using Pointer = uintptr_t;  // tensor.data_ptr(); 0 where there is no tensor

template <class T>
T* at(Pointer p) {
  return reinterpret_cast<T*>(p);
}

bool runs_here(Isa isa) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::baseline: return __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("popcnt");
    case Isa::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
             __builtin_cpu_supports("bmi2");
    case Isa::avx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    case Isa::avx512_bf16:
      return runs_here(Isa::avx512) && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
#else
    default: return true;
#endif
  }
  return false;
}

const std::vector<std::pair<std::string, Isa>>& instruction_sets() {
#define ONEPASS_NAMED(isa) {#isa, Isa::isa},
  static const std::vector<std::pair<std::string, Isa>> all = {ONEPASS_FOR_EACH_ISA(ONEPASS_NAMED)};
#undef ONEPASS_NAMED
  return all;
}

std::vector<std::string> usable_instruction_sets() {
  std::vector<std::string> names;
  for (const auto& [name, isa] : instruction_sets())
    if (runs_here(isa)) names.push_back(name);
  return names;
}

Isa choose_isa() {
  const char* forced = std::getenv("ONEPASS_CPU_ISA");
  Isa best = instruction_sets().front().second;
  std::string usable;
  for (const auto& [name, isa] : instruction_sets()) {
    if (!runs_here(isa)) continue;
    if (forced && name == forced) return isa;
    best = isa;
    usable += (usable.empty() ? "" : ", ") + name;
  }
  if (forced && *forced)
    throw std::runtime_error("ONEPASS_CPU_ISA='" + std::string(forced) + "': this CPU runs " + usable);
  if (usable.empty()) throw std::runtime_error("this CPU lacks the baseline instruction set");
  return best;
}

struct Kernels {
  Isa isa;
  RngKernels rng;
  ReparamKernels reparam;
  AttentionKernels attention;
  DenoiseKernels denoise;
  BandwidthKernels bandwidth;
  CompositeKernels composite;
};

Kernels load(Isa isa) {
#define ONEPASS_LOAD(name) \
  if (isa == Isa::name)    \
    return {isa, name::rng, name::reparam, name::attention, name::denoise, name::bandwidth, name::composite};
  ONEPASS_FOR_EACH_ISA(ONEPASS_LOAD)
#undef ONEPASS_LOAD
  throw std::logic_error("no such instruction set");
}

Kernels kernels;

// (value, pointer to values or 0, step): one part of a random key.
using KeyArgument = std::tuple<int64_t, Pointer, int64_t>;

KeyPart key_part(const KeyArgument& a) { return {std::get<0>(a), at<const int64_t>(std::get<1>(a)), std::get<2>(a)}; }

// Of seed, stream and offset; None where no number is drawn.
using KeysArgument = std::optional<std::tuple<KeyArgument, KeyArgument, KeyArgument>>;

Keys keys(const KeysArgument& a) {
  if (!a) return {};
  const auto& [seed, stream, offset] = *a;
  return {key_part(seed), key_part(stream), key_part(offset)};
}

void bind_rng(py::module_& m) {
  m.def("rng_fill", [](int distribution, const KeysArgument& key, int64_t rows, int64_t length, int dtype, Pointer out,
                       int num_threads) {
    const Keys of = keys(key);
    py::gil_scoped_release nogil;
    kernels.rng.fill(static_cast<Distribution>(distribution), of, rows, length, static_cast<DType>(dtype),
                     at<void>(out), num_threads);
  });
}

// (pointer or 0, elements from a row to the next)
using RowsArgument = std::pair<Pointer, int64_t>;

RowsIn rows_in(const RowsArgument& a) { return {at<const void>(a.first), a.second}; }

// Pointers and steps one by one: unpacking tuples costs more than the rest of the call.
Reparam reparam(int64_t rows, int64_t length, int dtype, Pointer mean, int64_t mean_step, Pointer logvar,
                int64_t logvar_step, Pointer noise, int64_t noise_step, const KeysArgument& key, bool keys_per_row,
                int num_threads) {
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

void bind_reparam(py::module_& m) {
  m.attr("KL_TILE") = KL_TILE;
  m.def("reparam_forward", [](int64_t rows, int64_t length, int dtype, Pointer mean, int64_t mean_step, Pointer logvar,
                              int64_t logvar_step, Pointer noise, int64_t noise_step, const KeysArgument& key,
                              bool keys_per_row, int num_threads, Pointer z, Pointer kl, Pointer partial) {
    const Reparam p = reparam(rows, length, dtype, mean, mean_step, logvar, logvar_step, noise, noise_step, key,
                              keys_per_row, num_threads);
    py::gil_scoped_release nogil;
    kernels.reparam.forward(p, at<void>(z), at<float>(kl), at<double>(partial));
  });
  m.def("reparam_backward", [](int64_t rows, int64_t length, int dtype, Pointer mean, int64_t mean_step, Pointer logvar,
                               int64_t logvar_step, Pointer noise, int64_t noise_step, const KeysArgument& key,
                               bool keys_per_row, int num_threads, Pointer grad_z, int64_t grad_z_step, Pointer grad_kl,
                               Pointer grad_mean, Pointer grad_logvar, Pointer grad_noise) {
    const Reparam p = reparam(rows, length, dtype, mean, mean_step, logvar, logvar_step, noise, noise_step, key,
                              keys_per_row, num_threads);
    py::gil_scoped_release nogil;
    kernels.reparam.backward(p, {at<const void>(grad_z), grad_z_step}, at<const float>(grad_kl), at<void>(grad_mean),
                             at<void>(grad_logvar), at<void>(grad_noise));
  });
}

// Returns the first row of the batch whose step is not a row of the table, or -1.
void bind_denoise(py::module_& m) {
  m.attr("DENOISE_COLUMNS") = static_cast<int>(COL_HISTORY);
  m.attr("MAX_HISTORY") = MAX_HISTORY;
  m.def(
      "denoise_step", [](int64_t batch, int64_t length, int dtype, int model_dtype, RowsArgument sample,
                         RowsArgument model, RowsArgument cond, RowsArgument noise, RowsArgument known,
                         std::tuple<Pointer, bool, int64_t, int64_t> mask, std::tuple<Pointer, int64_t, int64_t> table,
                         const KeyArgument& step, std::tuple<double, Pointer, int64_t> guidance,
                         const KeyArgument& seed, bool keys_per_row, Pointer state, RowsArgument out, int num_threads) {
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
            num_threads};
        py::gil_scoped_release nogil;
        return kernels.denoise.step(p);
      });
}

// (pointer, elements from a batch row, a token and a head to the next)
using HeadsArgument = std::tuple<Pointer, int64_t, int64_t, int64_t>;

Heads heads(const HeadsArgument& a) {
  return {at<const void>(std::get<0>(a)), std::get<1>(a), std::get<2>(a), std::get<3>(a)};
}

void bind_attention(py::module_& m) {
  py::class_<Cache>(m, "Cache")
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
  py::class_<Rotary>(m, "Rotary")
      .def(py::init([](Pointer cos, Pointer sin, int64_t positions, int64_t half, bool interleaved) {
        return Rotary{at<const float>(cos), at<const float>(sin), positions, half, interleaved};
      }));
  py::class_<Attention>(m, "Attention")
      .def(py::init([](std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t> sizes, int dtype,
                       const HeadsArgument& q, const HeadsArgument& k, const HeadsArgument& v, const HeadsArgument& out,
                       Pointer lse, const Cache& cache, const Rotary& rotary, bool rotary_ordered, int64_t window_left,
                       int64_t window_right, float softcap, float scale, Pointer slopes, int64_t slopes_batch,
                       Pointer sinks, int mask_kind, Pointer mask,
                       std::tuple<int64_t, int64_t, int64_t, int64_t> mask_steps, Pointer tree, int num_threads) {
        const auto [batch, n_heads, kv_heads, head_dim, value_dim, queries, tokens] = sizes;
        const auto [mask_batch, mask_head, mask_row, mask_key] = mask_steps;
        if (const char* fault = cache_fault(cache, batch, queries, tokens, rotary))
          throw py::value_error(std::string(fault) + " points outside the cache");
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
  m.def("attention_workspace", [](const Attention& p) { return kernels.attention.workspace(p); });
  m.def("attention_forward", [](const Attention& p, Pointer workspace) {
    py::gil_scoped_release nogil;
    kernels.attention.forward(p, at<void>(workspace));
  });
  m.def("kvcache_append", [](std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t> sizes, int dtype,
                             const HeadsArgument& k, const HeadsArgument& v, const HeadsArgument& k_cache,
                             const HeadsArgument& v_cache, const Cache& cache, const Rotary& rotary, int num_threads) {
    const auto [batch, kv_heads, head_dim, value_dim, tokens, steps] = sizes;
    if (const char* fault = cache_fault(cache, batch, cache.cu_seqlens ? tokens : steps, tokens, rotary))
      throw py::value_error(std::string(fault) + " points outside the cache");
    const Append p{batch,    kv_heads, head_dim,       value_dim,      tokens, steps,  static_cast<DType>(dtype),
                   heads(k), heads(v), heads(k_cache), heads(v_cache), cache,  rotary, num_threads};
    py::gil_scoped_release nogil;
    kernels.attention.append(p);
  });
}

void bind_bandwidth(py::module_& m) {
  m.def("read_bytes", [](Pointer source, int64_t bytes, int num_threads) {
    py::gil_scoped_release nogil;
    return kernels.bandwidth.read(at<const void>(source), bytes, num_threads);
  });
  m.def("copy_bytes", [](Pointer source, Pointer target, int64_t bytes, int num_threads) {
    py::gil_scoped_release nogil;
    kernels.bandwidth.copy(at<const void>(source), at<void>(target), bytes, num_threads);
  });
}

#if defined(__clang__)
#define ONEPASS_COMPILER "clang " __clang_version__
#else
#define ONEPASS_COMPILER "gcc " __VERSION__
#endif

// (pointer or 0, elements from a ray to the next, dtype)
using SamplesArgument = std::tuple<Pointer, int64_t, int>;

Samples samples(const SamplesArgument& a) {
  return {at<const void>(std::get<0>(a)), std::get<1>(a), static_cast<DType>(std::get<2>(a))};
}

// The samples of the longest ray, or -1 where offsets do not ascend from 0 to `total`.
int64_t longest_ray(const int64_t* offsets, int64_t n_rays, int64_t total) {
  int64_t longest = 0;
  if (offsets[0] != 0 || offsets[n_rays] != total) return -1;
  for (int64_t r = 0; r < n_rays; ++r) {
    if (offsets[r + 1] < offsets[r] || offsets[r + 1] > total) return -1;
    longest = std::max(longest, offsets[r + 1] - offsets[r]);
  }
  return longest;
}

void bind_volrend(py::module_& m) {
  m.def("composite_scratch", composite_scratch);
  m.def("longest_ray", [](Pointer offsets, int64_t n_rays, int64_t total) {
    return longest_ray(at<const int64_t>(offsets), n_rays, total);
  });
  py::class_<Composite>(m, "Composite")
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
  m.def("composite_forward",
        [](const Composite& p, Pointer features, Pointer depth, Pointer opacity, Pointer weights, Pointer distortion) {
          py::gil_scoped_release nogil;
          kernels.composite.forward(
              p, {at<void>(features), at<void>(depth), at<void>(opacity), at<void>(weights), at<void>(distortion)});
        });
  m.def("composite_backward", [](const Composite& p, Pointer grad_features, Pointer grad_depth, Pointer grad_opacity,
                                 Pointer grad_distortion, const SamplesArgument& grad_weights, Pointer sigmas,
                                 Pointer features, Pointer t_starts, Pointer t_ends, Pointer alphas, Pointer background,
                                 Pointer prefix_trans, Pointer left) {
    const CompositeGradIn in{at<const float>(grad_features), at<const float>(grad_depth), at<const float>(grad_opacity),
                             at<const float>(grad_distortion), samples(grad_weights)};
    py::gil_scoped_release nogil;
    kernels.composite.backward(p, in,
                               {at<void>(sigmas), at<void>(features), at<void>(t_starts), at<void>(t_ends),
                                at<void>(alphas), at<float>(background), at<float>(prefix_trans), at<float>(left)});
  });
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of onepass: pointers in, nothing allocated.";
  kernels = load(choose_isa());
  m.attr("isa") = instruction_sets()[static_cast<size_t>(kernels.isa)].first;
  m.attr("compiler") = ONEPASS_COMPILER;
  m.attr("usable_isas") = usable_instruction_sets();
#ifdef ONEPASS_WITH_CUDA
  m.attr("has_cuda") = true;
  m.def("cuda_devices", cuda_devices);
#else
  m.attr("has_cuda") = false;
#endif
  bind_rng(m);
  bind_reparam(m);
  bind_attention(m);
  bind_denoise(m);
  bind_bandwidth(m);
  bind_volrend(m);
}
