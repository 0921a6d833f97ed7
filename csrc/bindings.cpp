// The CPU's kernels as Python sees them; beside this file only bindings*.* knows Python. The GIL is released while a
// kernel runs. The instruction set is chosen once, at load: the best this CPU has, or the one ONEPASS_CPU_ISA names.
#include "bindings.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "onepass/bandwidth.h"

using namespace onepass;
using namespace onepass::bindings;

namespace {

#if defined(__x86_64__)
bool has_f16c() {  // Clang 14's __builtin_cpu_supports does not know the name
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}
#endif

bool runs_here(Isa isa) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::baseline: return __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("popcnt");
    case Isa::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
             has_f16c();
    case Isa::avx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    case Isa::avx512_vnni: return runs_here(Isa::avx512) && __builtin_cpu_supports("avx512vnni");
    case Isa::avx512_bf16: return runs_here(Isa::avx512_vnni) && __builtin_cpu_supports("avx512bf16");
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

const char* forced_isa() { return std::getenv("ONEPASS_CPU_ISA"); }

Isa choose_isa() {
  const char* forced = forced_isa();
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

// Intel's cores take vdpbf16ps a quarter as often as an FMA of half its products (Emerald Rapids: 0.44 and 1.84 a
// cycle), AMD's Zen 5 as often. So attention widens bfloat16 on Intel's.
Isa attention_isa(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::avx512_bf16 && __builtin_cpu_is("intel") && !(forced_isa() && *forced_isa())) return Isa::avx512_vnni;
#endif
  return isa;
}

struct Kernels {
  Isa isa;
  RngKernels rng;
  ReparamKernels reparam;
  AttentionKernels attention;
  AttentionBackwardKernels attention_backward;
  MergeKernels attention_merge;
  KvcacheKernels kvcache;
  DenoiseKernels denoise;
  BandwidthKernels bandwidth;
  CompositeKernels composite;
  LatentKernels latent;
  GumbelKernels gumbel;
  InterpolateKernels interpolate;
};

Kernels load(Isa isa) {
#define ONEPASS_LOAD(name)            \
  if (isa == Isa::name)               \
    return {isa,                      \
            name::rng,                \
            name::reparam,            \
            name::attention,          \
            name::attention_backward, \
            name::attention_merge,    \
            name::kvcache,            \
            name::denoise,            \
            name::bandwidth,          \
            name::composite,          \
            name::latent,             \
            name::gumbel,             \
            name::interpolate};
  ONEPASS_FOR_EACH_ISA(ONEPASS_LOAD)
#undef ONEPASS_LOAD
  throw std::logic_error("no such instruction set");
}

const std::string& name_of(Isa isa) { return instruction_sets()[static_cast<size_t>(isa)].first; }

Kernels kernels;

void bind_sampling(py::module_& m) {
  def_rng_fill<int>(m, [](Distribution kind, const Keys& keys, int64_t rows, int64_t length, DType dtype, void* out,
                          int num_threads) {
    py::gil_scoped_release nogil;
    kernels.rng.fill(kind, keys, rows, length, dtype, out, num_threads);
  });
  def_reparam<int>(
      m, KL_TILE,
      [](Reparam p, void* z, float* kl, double* partial, int num_threads) {
        p.num_threads = num_threads;
        py::gil_scoped_release nogil;
        kernels.reparam.forward(p, z, kl, partial);
      },
      [](Reparam p, RowsIn grad_z, const float* grad_kl, void* grad_mean, void* grad_logvar, void* grad_noise,
         int num_threads) {
        p.num_threads = num_threads;
        py::gil_scoped_release nogil;
        kernels.reparam.backward(p, grad_z, grad_kl, grad_mean, grad_logvar, grad_noise);
      });
  def_latent<int>(
      m,
      [](Latent p, const LatentOut& out, int num_threads) {
        p.num_threads = num_threads;
        py::gil_scoped_release nogil;
        kernels.latent.forward(p, out);
      },
      [](Latent p, const LatentGradIn& in, const LatentGradOut& out, int num_threads) {
        p.num_threads = num_threads;
        py::gil_scoped_release nogil;
        kernels.latent.backward(p, in, out);
      });
  def_gumbel_softmax<int>(m, [](GumbelSoftmax p, const Array& logits, int num_threads) {
    p.num_threads = static_cast<int>(std::min<int64_t>(num_threads, p.groups));
    const Scratch scratch(p.num_threads * (p.n + GUMBEL_MARGIN) * static_cast<int64_t>(sizeof(float)), logits);
    p.scratch = static_cast<float*>(scratch.data());
    py::gil_scoped_release nogil;
    kernels.gumbel.softmax(p);
  });
}

void bind_interpolate(py::module_& m) {
  def_interpolate<int>(
      m, interpolate_workspace,
      [](Interpolate p, void* out, void* partial, int num_threads) {
        p.num_threads = num_threads;
        py::gil_scoped_release nogil;
        kernels.interpolate.forward(p, out, static_cast<PairSums*>(partial));
      },
      [](Interpolate p, const InterpolateGradOut& out, void* partial, int num_threads) {
        p.num_threads = num_threads;
        py::gil_scoped_release nogil;
        kernels.interpolate.backward(p, out, static_cast<PairSums*>(partial));
      });
}

void bind_denoise(py::module_& m) {
  def_denoise_step<int>(m, [](Denoise p, int num_threads) {
    p.num_threads = num_threads;
    py::gil_scoped_release nogil;
    return kernels.denoise.step(p);
  });
}

// Raises where a length, page or offset points outside the cache: before anything is read or written.
void inside(const Cache& cache, int64_t batch, int64_t queries, int64_t tokens, const Rotary& rotary) {
  if (const char* fault = cache_fault(cache, batch, queries, tokens, rotary))
    throw py::value_error(std::string(fault) + " points outside the cache");
}

void bind_attention(py::module_& m) {
  m.def("attention_forward", [](const Attention& p, const Array& q) {
    inside(p.cache, p.batch, p.queries, p.tokens, p.rotary);
    const Scratch workspace(kernels.attention.workspace(p), q);
    py::gil_scoped_release nogil;
    kernels.attention.forward(p, workspace.data());
  });
  m.def("attention_backward",
        [](const Attention& forward, const Array& grad_out, const Array& grad_lse, const Array& dq, const Array& dk,
           const Array& dv, const Array& top, const Array& excess, const Array& delta) {
          const AttentionBackward p{forward,   heads(grad_out), grad_lse.as<const float>(), heads(dq),        heads(dk),
                                    heads(dv), top.as<float>(), excess.as<float>(),         delta.as<float>()};
          const Scratch workspace(kernels.attention_backward.workspace(forward), dq);
          py::gil_scoped_release nogil;
          kernels.attention_backward.backward(p, workspace.data());
        });
  def_kvcache_append<int>(m, [](Append p, int num_threads) {
    inside(p.cache, p.batch, p.cache.cu_seqlens ? p.tokens : p.steps, p.tokens, p.rotary);
    p.num_threads = num_threads;
    py::gil_scoped_release nogil;
    kernels.kvcache.append(p);
  });
}

void bind_attention_merge(py::module_& m) {
  def_merge_attention<int>(
      m,
      [](Merge p, void* out, float* lse, int num_threads) {
        p.num_threads = num_threads;
        py::gil_scoped_release nogil;
        kernels.attention_merge.forward(p, out, lse);
      },
      [](MergeBackward p, int num_threads) {
        p.forward.num_threads = num_threads;
        py::gil_scoped_release nogil;
        kernels.attention_merge.backward(p);
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
  m.doc() = "Native kernels of onepass: checked tensors in, results written where they are.";
  kernels = load(choose_isa());
  kernels.attention = load(attention_isa(kernels.isa)).attention;
  m.attr("isa") = name_of(kernels.isa);
  m.attr("attention_isa") = name_of(attention_isa(kernels.isa));
  m.attr("compiler") = ONEPASS_COMPILER;
  m.attr("usable_isas") = usable_instruction_sets();
#ifdef ONEPASS_WITH_CUDA
  m.attr("has_cuda") = true;
  m.def("cuda_devices", cuda_devices);
  bind_cuda(m.def_submodule("cuda"));
#else
  m.attr("has_cuda") = false;
#endif
  bind_calls(m);
  bind_sampling(m);
  bind_interpolate(m);
  bind_attention(m);
  bind_attention_merge(m);
  bind_denoise(m);
  bind_bandwidth(m);
  bind_volrend(m);
}
