#include "latent.cuh"

#include <type_traits>

#include "launch.cuh"

namespace onepass::cuda {
namespace {

// run(T{}, std::bool_constant<there is a prior>{})
template <class Run>
void with_operands(const Latent& p, Run&& run) {
  with_device_dtype(p.dtype, [&](auto t) {
    if (p.prior_mean.data)
      run(t, std::true_type{});
    else
      run(t, std::false_type{});
  });
}

}  // namespace

void latent_forward(const Latent& p, const LatentOut& out, const Stream& stream) {
  with_operands(p, [&](auto t, auto prior) {
    using T = decltype(t);
    constexpr bool PRIOR = decltype(prior)::value;
    const int64_t tiles = (p.length() + LATENT_TILE - 1) / LATENT_TILE;
    launch_tiles(stream, p.rows, p.length(), LATENT_TILE, posterior<T, PRIOR, WARP>, posterior<T, PRIOR, BLOCK>, p,
                 out);
    if (!out.partial) return;
    const int64_t planes = p.terms == LatentTerms::row ? 1 : 2 * p.samples, warps = BLOCK / WARP;
    launch(stream, grid_size((planes * p.rows + warps - 1) / warps), BLOCK, 0, sum_tiles, p, out, planes, tiles);
  });
}

void latent_backward(const Latent& p, const LatentGradIn& in, const LatentGradOut& out, const Stream& stream) {
  with_operands(p, [&](auto t, auto prior) {
    using T = decltype(t);
    constexpr bool PRIOR = decltype(prior)::value;
    const int64_t groups = p.rows * ((p.length() + BACKWARD_TILE - 1) / BACKWARD_TILE), warps = SHORT_BLOCK / WARP;
    launch(stream, grid_size((groups + warps - 1) / warps), SHORT_BLOCK, 0, posterior_backward<T, PRIOR>, groups, p, in,
           out);
  });
}

}  // namespace onepass::cuda
