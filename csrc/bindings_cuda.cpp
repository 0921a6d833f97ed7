// The CUDA kernels as Python sees them. A launch waits for nothing, so the GIL is not worth releasing.
#include "bindings.h"

namespace onepass::bindings {
namespace {

using Place = std::pair<int, Pointer>;  // device, cudaStream_t

Stream on(const Place& place) { return {place.first, at<void>(place.second)}; }

void bind_sampling(py::module_& m) {
  def_rng_fill<Place>(m, [](Distribution kind, const Keys& keys, int64_t rows, int64_t length, DType dtype, void* out,
                            const Place& place) { cuda::rng_fill(kind, keys, rows, length, dtype, out, on(place)); });
  def_reparam<Place>(
      m, cuda::KL_TILE,
      [](const Reparam& p, void* z, float* kl, double* partial, const Place& place) {
        cuda::reparam_forward(p, z, kl, partial, on(place));
      },
      [](const Reparam& p, RowsIn grad_z, const float* grad_kl, void* grad_mean, void* grad_logvar, void* grad_noise,
         const Place& place) {
        cuda::reparam_backward(p, grad_z, grad_kl, grad_mean, grad_logvar, grad_noise, on(place));
      });
  def_latent<Place>(
      m, [](const Latent& p, const LatentOut& out, const Place& place) { cuda::latent_forward(p, out, on(place)); },
      [](const Latent& p, const LatentGradIn& in, const LatentGradOut& out, const Place& place) {
        cuda::latent_backward(p, in, out, on(place));
      });
  def_gumbel_softmax<Place>(
      m, [](const GumbelSoftmax& p, const Array&, const Place& place) { cuda::gumbel_softmax(p, on(place)); });
}

void bind_interpolate(py::module_& m) {
  def_interpolate<Place>(
      m, cuda::interpolate_workspace,
      [](const Interpolate& p, void* out, void* partial, const Place& place) {
        cuda::interpolate_forward(p, out, partial, on(place));
      },
      [](const Interpolate& p, const InterpolateGradOut& out, void* partial, const Place& place) {
        cuda::interpolate_backward(p, out, partial, on(place));
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
  bind_sampling(m);
  bind_interpolate(m);
  bind_denoise(m);
  bind_volrend(m);
  bind_attention(m);
}

}  // namespace onepass::bindings
