// The CUDA kernels as Python sees them. A launch waits for nothing, so the GIL is not worth releasing.
#include "bindings.h"

namespace onepass::bindings {
namespace {

using Place = std::pair<int, Pointer>;  // device, cudaStream_t

Stream on(const Place& place) { return {place.first, at<void>(place.second)}; }

void bind_rng(py::module_& m) {
  m.def("rng_fill", [](int distribution, const KeysArgument& key, int64_t rows, int64_t length, int dtype, Pointer out,
                       const Place& place) {
    cuda::rng_fill(static_cast<Distribution>(distribution), keys(key), rows, length, static_cast<DType>(dtype),
                   at<void>(out), on(place));
  });
}

void bind_reparam(py::module_& m) {
  m.attr("KL_TILE") = cuda::KL_TILE;
  m.def("reparam_forward", [](int64_t rows, int64_t length, int dtype, Pointer mean, int64_t mean_step, Pointer logvar,
                              int64_t logvar_step, Pointer noise, int64_t noise_step, const KeysArgument& key,
                              bool keys_per_row, const Place& place, Pointer z, Pointer kl, Pointer partial) {
    const Reparam p =
        reparam(rows, length, dtype, mean, mean_step, logvar, logvar_step, noise, noise_step, key, keys_per_row, 0);
    cuda::reparam_forward(p, at<void>(z), at<float>(kl), at<double>(partial), on(place));
  });
  m.def("reparam_backward", [](int64_t rows, int64_t length, int dtype, Pointer mean, int64_t mean_step, Pointer logvar,
                               int64_t logvar_step, Pointer noise, int64_t noise_step, const KeysArgument& key,
                               bool keys_per_row, const Place& place, Pointer grad_z, int64_t grad_z_step,
                               Pointer grad_kl, Pointer grad_mean, Pointer grad_logvar, Pointer grad_noise) {
    const Reparam p =
        reparam(rows, length, dtype, mean, mean_step, logvar, logvar_step, noise, noise_step, key, keys_per_row, 0);
    cuda::reparam_backward(p, {at<const void>(grad_z), grad_z_step}, at<const float>(grad_kl), at<void>(grad_mean),
                           at<void>(grad_logvar), at<void>(grad_noise), on(place));
  });
}

void bind_latent(py::module_& m) {
  m.def("latent_forward",
        [](const Latent& p, Pointer z, Pointer first, Pointer second, Pointer partial, const Place& place) {
          cuda::latent_forward(p, {at<void>(z), at<float>(first), at<float>(second), at<double>(partial)}, on(place));
        });
  m.def("latent_backward", [](const Latent& p, const SegmentsArgument& grad_z, int64_t z_sample, Pointer grad_first,
                              Pointer grad_second, const SegmentsArgument& mean, const SegmentsArgument& logvar,
                              const SegmentsArgument& prior_mean, const SegmentsArgument& prior_logvar, Pointer noise,
                              const Place& place) {
    cuda::latent_backward(p, {segments_in(grad_z), z_sample, at<const float>(grad_first), at<const float>(grad_second)},
                          {segments_out(mean), segments_out(logvar), segments_out(prior_mean),
                           segments_out(prior_logvar), at<void>(noise)},
                          on(place));
  });
}

void bind_gumbel(py::module_& m) {
  m.def("gumbel_softmax", [](int64_t groups, int64_t n, int64_t keyed, int dtype, Pointer logits, Pointer grad,
                             const KeysArgument& key, float tau, bool hard, Pointer out, const Place& place) {
    cuda::gumbel_softmax({groups, n, keyed, static_cast<DType>(dtype), at<const void>(logits), at<const void>(grad),
                          keys(key), tau, hard, at<void>(out), nullptr, 0},
                         on(place));
  });
}

void bind_interpolate(py::module_& m) {
  m.def("interpolate_workspace", cuda::interpolate_workspace);
  m.def("interpolate_forward", [](const Interpolate& p, Pointer out, Pointer partial, const Place& place) {
    cuda::interpolate_forward(p, at<void>(out), at<void>(partial), on(place));
  });
  m.def("interpolate_backward", [](const Interpolate& p, Pointer start, Pointer end, Pointer weights, Pointer vectors,
                                   Pointer partial, const Place& place) {
    cuda::interpolate_backward(p, {at<void>(start), at<void>(end), at<float>(weights), at<double>(vectors)},
                               at<void>(partial), on(place));
  });
}

void bind_denoise(py::module_& m) {
  def_denoise_step<Place>(m, [](const Denoise& p, const Place& place) { return cuda::denoise_step(p, on(place)); });
}

void bind_volrend(py::module_& m) {
  m.def("composite_scratch", cuda::composite_scratch);
  m.def("composite_forward", [](const Composite& p, Pointer features, Pointer depth, Pointer opacity, Pointer weights,
                                Pointer distortion, const Place& place) {
    cuda::composite_forward(
        p, {at<void>(features), at<void>(depth), at<void>(opacity), at<void>(weights), at<void>(distortion)},
        on(place));
  });
  m.def("composite_backward", [](const Composite& p, Pointer grad_features, Pointer grad_depth, Pointer grad_opacity,
                                 Pointer grad_distortion, const SamplesArgument& grad_weights, Pointer sigmas,
                                 Pointer features, Pointer t_starts, Pointer t_ends, Pointer alphas, Pointer background,
                                 Pointer prefix_trans, Pointer left, const Place& place) {
    cuda::composite_backward(p,
                             {at<const float>(grad_features), at<const float>(grad_depth),
                              at<const float>(grad_opacity), at<const float>(grad_distortion), samples(grad_weights)},
                             {at<void>(sigmas), at<void>(features), at<void>(t_starts), at<void>(t_ends),
                              at<void>(alphas), at<float>(background), at<float>(prefix_trans), at<float>(left)},
                             on(place));
  });
}

void bind_attention(py::module_& m) {
  m.def("attention_forward", [](const Attention& p, const Array& q, const Place& place) {
    const Scratch workspace(cuda::attention_workspace(p), q);
    cuda::attention_forward(p, workspace.data(), on(place));
  });
  def_kvcache_append<Place>(m, [](const Append& p, const Place& place) { cuda::kvcache_append(p, on(place)); });
  def_merge_attention<Place>(
      m,
      [](const Merge& p, void* out, float* lse, const Place& place) { cuda::merge_attention(p, out, lse, on(place)); },
      [](const MergeBackward& p, const Place& place) { cuda::merge_attention_backward(p, on(place)); });
}

}  // namespace

void bind_cuda(py::module_ m) {
  bind_rng(m);
  bind_reparam(m);
  bind_latent(m);
  bind_gumbel(m);
  bind_interpolate(m);
  bind_denoise(m);
  bind_volrend(m);
  bind_attention(m);
}

}  // namespace onepass::bindings
