#include "volrend.cuh"

#include "launch.cuh"

namespace onepass::cuda {
namespace {

unsigned blocks_of(const Composite& p) { return grid_size((p.n_rays + SHORT_BLOCK / WARP - 1) / (SHORT_BLOCK / WARP)); }

// Packed, n_samples is that of all rays.
int64_t samples_of(const Composite& p) { return p.ray_offsets ? p.n_samples : p.n_rays * p.n_samples; }

}  // namespace

int64_t composite_scratch(int64_t samples, int64_t n_rays, int64_t n_channels, bool backward) {
  return (backward ? 5 : n_channels > FEW_CHANNELS ? 1 : 0) * (samples + n_rays);
}

void composite_forward(const Composite& p, const CompositeOut& out, const Stream& stream) {
  with_device_dtype(p.features.dtype, [&](auto t) {
    launch(stream, blocks_of(p), SHORT_BLOCK, 0, render<decltype(t)>, p, out, samples_of(p));
  });
}

void composite_backward(const Composite& p, const CompositeGradIn& in, const CompositeGradOut& out,
                        const Stream& stream) {
  with_device_dtype(p.features.dtype, [&](auto t) {
    launch(stream, blocks_of(p), SHORT_BLOCK, 0, render_backward<decltype(t)>, p, in, out, samples_of(p));
  });
  if (out.background && !p.background_step && in.features && p.n_channels)
    launch(stream, grid_size(p.n_channels), BLOCK, 0, add_background, in.features, out.left, p.n_rays, p.n_channels,
           out.background);
}

}  // namespace onepass::cuda
