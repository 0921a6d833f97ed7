"""Compositing along rays in Triton, dense or packed, forward and backward: the formulas of engine/reference/volrend.py.

A program walks one ray, B samples at a time, from its first sample: no other ray changes a bit. Transmittance is
scanned inside a chunk as head + tail, so that a long product is as good as a short one, and carried from chunk to
chunk. Backward walks forward once, keeping what each chunk begins with, and then from the far end, where a linear
recursion gives what lies behind each sample without dividing by 1 - alpha. Bytes: forward reads sigma, two times and N
channels a sample once; backward reads sigma and times twice (the second time from cache) and writes the gradients.

Rays begin at any address, so no argument is specialised on its alignment: a chunk's sums have one order.
"""
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.volrend import DEPTHS, offsets_error
from ._host import OPTIONS, on, power_of_two
from ._ray import affine, clear, lane_at, march, put, ray_at, sample_at, shift_down, spread_of

CHUNK = 128         # samples at a time: four a lane of one warp
CHANNELS = 32       # at a time
CARRIES = 5         # numbers kept of each chunk for the way back

EXPECTED: tl.constexpr = tl.constexpr(DEPTHS.index("expected"))
NORMALIZED: tl.constexpr = tl.constexpr(DEPTHS.index("normalized"))
MEDIAN: tl.constexpr = tl.constexpr(DEPTHS.index("median"))
FLOOR: tl.constexpr = tl.constexpr(2.0**-23)

_INPUTS = ["Sigmas", "Alphas", "Features", "Starts", "Ends", "Offsets", "Background", "Prefix"]
_FORWARD = ["Colors", "Depths", "Opacities", "Weights", "Distortions"]
_BACKWARD = [
    "OnColors", "OnDepths", "OnOpacities", "OnWeights", "OnDistortions", "DSigmas", "DFeatures", "DStarts", "DEnds",
    "DAlphas", "DBackground", "DPrefix", "Left", "Scratch",
]
_NUMBERS = ["total", "n_samples", "sigma_step", "alpha_step", "feature_step", "start_step", "end_step", "eps"]


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=[*_INPUTS, *_FORWARD])
def composite_rays(
    Sigmas, Alphas, Features, Starts, Ends, Offsets, Background, Prefix, Colors, Depths, Opacities, Weights,
    Distortions, total: tl.int64, n_samples, sigma_step, alpha_step, feature_step, start_step, end_step, eps,
    N: tl.constexpr, SHARED: tl.constexpr, DEPTH: tl.constexpr, NB: tl.constexpr, B: tl.constexpr,
):
    ray = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    first, count, sigmas_at, alphas_at, features_at, starts_at, ends_at = ray_at(
        Offsets, ray, total, n_samples, sigma_step, alpha_step, feature_step, start_step, end_step, N
    )
    lane = tl.arange(0, B)
    channel = block * NB + tl.arange(0, NB)
    head = tl.full([], 1.0, tl.float32) if Prefix is None else tl.load(Prefix + ray)
    tail, front, reach, edge = head * 0, head * 0, head * 0, head * 0
    opacity, depth, spread = tl.zeros([B], tl.float32), tl.zeros([B], tl.float32), tl.zeros([B], tl.float32)
    color = tl.zeros([NB], tl.float32)
    middle, crossed = head * 0, head < 0
    i = count * 0
    marching = count > 0
    while marching:
        at = i + lane
        inside = at < count
        alpha, keep, _, mid, delta = sample_at(
            Sigmas, Alphas, Starts, Ends, sigmas_at, alphas_at, starts_at, ends_at, at, inside
        )
        _, after, alpha, weight, mid, lit, stop, head, tail = march(
            alpha, keep, mid, head, tail, eps, lane, inside, B
        )
        opacity += weight
        depth = tl.fma(weight, mid, depth)
        place = features_at + at[:, None] * N + channel[None, :]
        c = tl.load(Features + place, mask=lit[:, None] & (channel < N)[None, :], other=0.0).to(tl.float32)
        color += tl.sum(weight[:, None] * c, 0)
        if DEPTH == MEDIAN:         # the first sample behind which half of the light is gone, else the last
            last = tl.max(tl.where(lit, lane, -1), 0)
            here = tl.min(tl.where(lit & ~(after > 0.5), lane, B), 0)
            middle = tl.where(crossed | (last < 0), middle, lane_at(mid, lane, tl.minimum(here, last)))
            crossed = crossed | (here < B)
        if Distortions is not None:
            _, far, front, reach, edge = spread_of(weight, mid, front, reach, edge, lane, B)
            delta = tl.where(lit, delta, 0.0)
            spread = tl.fma(weight, tl.fma(weight * delta, delta * 0 + 0.3333333432674408, 2.0 * far), spread)
        if Weights is not None:
            tl.store(Weights + first + at, weight.to(Weights.dtype.element_ty), mask=inside & (block == 0))
        i += B
        marching = (i < count) & (stop == B)
    if Weights is not None:
        while i < count:
            at = i + lane
            tl.store(Weights + first + at, (at * 0).to(Weights.dtype.element_ty), mask=(at < count) & (block == 0))
            i += B
    if Background is not None:
        shift = channel if SHARED else ray * N + channel
        color = tl.fma(head + tail + color * 0, tl.load(Background + shift, mask=channel < N, other=0.0), color)
    tl.store(Colors + ray * N + channel, color.to(Colors.dtype.element_ty), mask=channel < N)
    if block == 0:
        through, along = tl.sum(opacity, 0), tl.sum(depth, 0)
        if DEPTH == NORMALIZED:
            along = tl.div_rn(along, tl.where(through < FLOOR, FLOOR, through))
        if DEPTH == MEDIAN:
            along = middle
        tl.store(Depths + ray, along.to(Depths.dtype.element_ty))
        tl.store(Opacities + ray, through.to(Opacities.dtype.element_ty))
        if Distortions is not None:
            tl.store(Distortions + ray, tl.sum(spread, 0).to(Distortions.dtype.element_ty))


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=[*_INPUTS, *_BACKWARD])
def composite_rays_backward(
    OnColors, OnDepths, OnOpacities, OnWeights, OnDistortions, Sigmas, Alphas, Features, Starts, Ends, Offsets,
    Background, Prefix, DSigmas, DFeatures, DStarts, DEnds, DAlphas, DBackground, DPrefix, Left, Scratch,
    total: tl.int64, n_samples, sigma_step, alpha_step, feature_step, start_step, end_step, weight_step, eps,
    N: tl.constexpr, SHARED: tl.constexpr, DEPTH: tl.constexpr, NB: tl.constexpr, B: tl.constexpr, KEPT: tl.constexpr,
):
    ray = tl.program_id(0).to(tl.int64)
    first, count, sigmas_at, alphas_at, features_at, starts_at, ends_at = ray_at(
        Offsets, ray, total, n_samples, sigma_step, alpha_step, feature_step, start_step, end_step, N
    )
    lane = tl.arange(0, B)
    head = tl.full([], 1.0, tl.float32) if Prefix is None else tl.load(Prefix + ray)
    tail, front, reach, edge = head * 0, head * 0, head * 0, head * 0
    opacity, depth = tl.zeros([B], tl.float32), tl.zeros([B], tl.float32)
    kept = Scratch + (first // B + ray) * KEPT

    i = count * 0
    marching = count > 0
    while marching:
        tl.store(kept, head)
        tl.store(kept + 1, tail)
        tl.store(kept + 2, front)
        tl.store(kept + 3, reach)
        tl.store(kept + 4, edge)
        at = i + lane
        inside = at < count
        alpha, keep, _, mid, _ = sample_at(
            Sigmas, Alphas, Starts, Ends, sigmas_at, alphas_at, starts_at, ends_at, at, inside
        )
        _, _, _, weight, mid, _, stop, head, tail = march(alpha, keep, mid, head, tail, eps, lane, inside, B)
        opacity += weight
        depth = tl.fma(weight, mid, depth)
        if OnDistortions is not None:
            _, _, front, reach, edge = spread_of(weight, mid, front, reach, edge, lane, B)
        i += B
        kept += KEPT
        marching = (i < count) & (stop == B)
    tl.debug_barrier()

    left = head + tail
    tl.store(Left + ray, left)
    beyond = i
    while beyond < count:                           # behind the sample where the light went out
        at = beyond + lane
        inside = at < count
        clear(DSigmas, first + at, inside)
        clear(DAlphas, first + at, inside)
        clear(DStarts, first + at, inside)
        clear(DEnds, first + at, inside)
        if DFeatures is not None:
            for k in range(0, N, NB):
                channel = k + tl.arange(0, NB)
                place = (first + at)[:, None] * N + channel[None, :]
                clear(DFeatures, place, inside[:, None] & (channel < N)[None, :])
        beyond += B

    on_depth, on_opacity, on_spread = head * 0, head * 0, head * 0
    if OnDepths is not None and DEPTH != MEDIAN:
        on_depth = tl.load(OnDepths + ray)
    if OnOpacities is not None:
        on_opacity = tl.load(OnOpacities + ray)
    if OnDistortions is not None:
        on_spread = tl.load(OnDistortions + ray)
    if DEPTH == NORMALIZED:
        through, along = tl.sum(opacity, 0), tl.sum(depth, 0)
        on_depth = tl.div_rn(on_depth, tl.where(through < FLOOR, FLOOR, through))
        on_opacity -= tl.where(through < FLOOR, 0.0, on_depth * tl.div_rn(along, tl.where(through == 0, 1.0, through)))

    ladder = head * 0                               # what one unit of light is worth behind a chunk
    if OnColors is not None:
        for k in range(0, N, NB):
            channel = k + tl.arange(0, NB)
            g = tl.load(OnColors + ray * N + channel, mask=channel < N, other=0.0)
            if Background is not None:
                shift = channel if SHARED else ray * N + channel
                ladder += tl.sum(g * tl.load(Background + shift, mask=channel < N, other=0.0), 0)
            if DBackground is not None:
                tl.store(DBackground + ray * N + channel, left * g, mask=channel < N)
    worth, rest, next_mid = head * 0, head * 0, head * 0
    while i > 0:
        i -= B
        kept -= KEPT
        at = i + lane
        inside = at < count
        alpha, keep, sigma, mid, delta = sample_at(
            Sigmas, Alphas, Starts, Ends, sigmas_at, alphas_at, starts_at, ends_at, at, inside
        )
        before, after, alpha, weight, mid, lit, stop, _, _ = march(
            alpha, keep, mid, tl.load(kept), tl.load(kept + 1), eps, lane, inside, B
        )
        gain = tl.fma(on_depth + mid * 0, mid, on_opacity + mid * 0)
        if OnColors is not None:
            for k in range(0, N, NB):
                channel = k + tl.arange(0, NB)
                g = tl.load(OnColors + ray * N + channel, mask=channel < N, other=0.0)
                place = at[:, None] * N + channel[None, :]
                c = tl.load(Features + features_at + place, mask=lit[:, None] & (channel < N)[None, :], other=0.0)
                gain += tl.sum(c.to(tl.float32) * g[None, :], 1)
                there = inside[:, None] & (channel < N)[None, :]
                put(DFeatures, first * N + place, weight[:, None] * g[None, :], there)
        elif DFeatures is not None:
            for k in range(0, N, NB):
                channel = k + tl.arange(0, NB)
                place = (first + at)[:, None] * N + channel[None, :]
                clear(DFeatures, place, inside[:, None] & (channel < N)[None, :])
        if OnWeights is not None:
            weights_at = first if Offsets is not None else ray * weight_step
            gain += tl.load(OnWeights + weights_at + at, mask=lit, other=0.0).to(tl.float32)
        d_mid, d_delta = on_depth * weight, weight * 0
        if OnDistortions is not None:
            in_front, far, _, _, _ = spread_of(
                weight, mid, tl.load(kept + 2), tl.load(kept + 3), tl.load(kept + 4), lane, B
            )
            behind = rest + tl.cumsum(weight, 0, reverse=True)
            at_back = shift_down(behind, rest, lane, B)
            worth_here = worth + tl.cumsum(at_back * (shift_down(mid, next_mid, lane, B) - mid), 0, reverse=True)
            distance = 2.0 * (far + worth_here)
            gain = tl.fma(on_spread + gain * 0, tl.fma(weight * delta, gain * 0 + 0.6666666865348816, distance), gain)
            d_mid = tl.fma(2.0 * on_spread * weight, in_front - at_back, d_mid)
            d_delta = on_spread * weight * weight * 0.3333333432674408
            worth, rest, next_mid = lane_at(worth_here, lane, 0), lane_at(behind, lane, 0), lane_at(mid, lane, 0)
        gain = tl.where(lit, gain, 0.0)
        value, scale = tl.associative_scan((alpha * gain, 1.0 - alpha), 0, affine, reverse=True)
        here = tl.fma(scale, ladder + scale * 0, value)
        gain -= shift_down(here, ladder, lane, B)
        ladder = lane_at(here, lane, 0)
        d_tau = tl.where(lit, after * gain, 0.0)
        put(DAlphas, first + at, tl.where(lit, before * gain, 0.0), inside)
        put(DSigmas, first + at, tl.where(lit, delta * d_tau, 0.0), inside)
        if Sigmas is not None:
            d_delta = tl.where(lit, tl.fma(sigma, d_tau, d_delta), 0.0)
        put(DStarts, first + at, 0.5 * d_mid - d_delta, inside)
        put(DEnds, first + at, 0.5 * d_mid + d_delta, inside)
    if DPrefix is not None:
        tl.store(DPrefix + ray, ladder)


class _Call:
    """How a call is laid out, and the arguments that both kernels share."""

    def __init__(
        self, sigmas: Tensor | None, features: Tensor, t_starts: Tensor, t_ends: Tensor, alphas: Tensor | None,
        ray_offsets: Tensor | None, background: Tensor | None, prefix_trans: Tensor | None, early_stop_eps: float,
        depth: str,
    ) -> None:
        density = alphas if sigmas is None else sigmas
        assert density is not None
        self.density, self.packed = density, ray_offsets is not None
        self.n_rays = density.shape[0] if ray_offsets is None else ray_offsets.shape[0] - 1
        self.n_channels = features.shape[-1]
        given = [self.samples(x) for x in (sigmas, alphas, features, t_starts, t_ends)]
        by_ray = lambda x: None if x is None else x.float().contiguous()
        offsets = None if ray_offsets is None else ray_offsets.contiguous()
        if offsets is not None and offsets.is_cpu and (why := offsets_error(offsets, density.shape[0])):
            raise ValueError(why)
        self.tensors = (*(x for x, _ in given), offsets, by_ray(background), by_ray(prefix_trans))
        samples = 0 if self.packed else density.shape[1]
        self.numbers: tuple[Any, ...] = (density.numel(), samples, *(step for _, step in given))
        self.eps = float(early_stop_eps)
        block = min(CHANNELS, power_of_two(self.n_channels))
        self.constants = {
            "N": self.n_channels, "SHARED": background is not None and background.dim() == 1,
            "DEPTH": DEPTHS.index(depth), "NB": block, "B": CHUNK, "num_warps": 1 if block <= 4 else 4, **OPTIONS,
        }

    def samples(self, x: Tensor | None) -> tuple[Tensor | None, int]:
        """A tensor of samples, copied unless it has unit stride inside a ray; and the step from ray to ray."""
        if x is None:
            return None, 0
        if not (x.is_contiguous() or (not self.packed and x.shape[0] and x[0].is_contiguous())):
            x = x.contiguous()
        return x, x.stride(0)


def forward(
    sigmas: Tensor | None, features: Tensor, t_starts: Tensor, t_ends: Tensor, alphas: Tensor | None,
    ray_offsets: Tensor | None, background: Tensor | None, prefix_trans: Tensor | None, early_stop_eps: float,
    depth: str, return_weights: bool, distortion: bool, out: tuple[Tensor | None, ...] | None = None,
) -> tuple[Tensor, ...]:
    call = _Call(
        sigmas, features, t_starts, t_ends, alphas, ray_offsets, background, prefix_trans, early_stop_eps, depth
    )
    n_rays, density = call.n_rays, call.density
    shapes = (
        (n_rays, call.n_channels), (n_rays,), (n_rays,), density.shape if return_weights else (0,),
        (n_rays if distortion else 0,),
    )
    dtypes = (features.dtype, t_starts.dtype, density.dtype, density.dtype, t_starts.dtype)
    given = (None,) * 5 if out is None else out
    results = [
        x if x is not None and x.is_contiguous() else torch.empty(shape, dtype=dtype, device=density.device)
        for x, shape, dtype in zip(given, shapes, dtypes, strict=True)
    ]
    wanted = (True, True, True, return_weights, distortion)
    if n_rays:
        pointers = [x if want else None for x, want in zip(results, wanted, strict=True)]
        blocks = max(1, -(-call.n_channels // call.constants["NB"]))
        with on(density):
            composite_rays[(n_rays, blocks)](*call.tensors, *pointers, *call.numbers, call.eps, **call.constants)
    return tuple(r if x is None or x is r else x.copy_(r) for r, x in zip(results, given, strict=True))


def backward(
    grad_features: Tensor | None, grad_depth: Tensor | None, grad_opacity: Tensor | None, grad_weights: Tensor | None,
    grad_distortion: Tensor | None, sigmas: Tensor | None, features: Tensor, t_starts: Tensor, t_ends: Tensor,
    alphas: Tensor | None, ray_offsets: Tensor | None, background: Tensor | None, prefix_trans: Tensor | None,
    early_stop_eps: float, depth: str, needs: list[bool], out: None = None,
) -> tuple[Tensor, ...]:
    call = _Call(
        sigmas, features, t_starts, t_ends, alphas, ray_offsets, background, prefix_trans, early_stop_eps, depth
    )
    inputs = (sigmas, features, t_starts, t_ends, alphas, background, prefix_trans)
    wanted = [x if need else None for x, need in zip(inputs, needs, strict=True)]
    fresh = lambda *shape, dtype=torch.float32: torch.empty(shape, dtype=dtype, device=call.density.device)
    by_sample = [None if x is None else fresh(*x.shape, dtype=x.dtype) for x in wanted[:5]]
    grads = [None if g is None else g.float().contiguous() for g in (grad_features, grad_depth, grad_opacity)]
    shared = background is not None and background.dim() == 1
    on_background = None
    if wanted[5] is not None and not shared:
        on_background = fresh(*wanted[5].shape) if grads[0] is not None else fresh(*wanted[5].shape).zero_()
    on_prefix = None if wanted[6] is None else fresh(call.n_rays)
    left = fresh(call.n_rays)
    if call.n_rays:
        on_weights, weight_step = call.samples(grad_weights)
        spread = None if grad_distortion is None else grad_distortion.float().contiguous()
        scratch = fresh((call.density.numel() // CHUNK + call.n_rays + 1) * CARRIES)
        with on(call.density):
            composite_rays_backward[(call.n_rays,)](
                *grads, on_weights, spread, *call.tensors, *by_sample, on_background, on_prefix, left, scratch,
                *call.numbers, weight_step, call.eps, KEPT=CARRIES, **call.constants,
            )
    if wanted[5] is not None and shared:
        lit = left.double()[:, None] * grads[0] if grads[0] is not None else fresh(0, call.n_channels)
        on_background = lit.sum(0)
    by_ray = zip(wanted[5:], (on_background, on_prefix), strict=True)
    rounded = [None if x is None or g is None else g.to(x.dtype) for x, g in by_ray]
    return tuple(fresh(0) if g is None else g for g in (*by_sample, *rounded))
