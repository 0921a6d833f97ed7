"""Emission-absorption compositing in plain PyTorch: the definition that every backend is held to.

With T_1 = prefix_trans (1 without one), delta_i = t_ends_i - t_starts_i and m_i = (t_starts_i + t_ends_i) / 2:

    alpha_i = 1 - exp(-sigma_i delta_i)      w_i = T_i alpha_i      T_{i+1} = T_i (1 - alpha_i)
    C = sum w_i c_i + T_end background       O = sum w_i            D = sum w_i m_i
    L = sum_ij w_i w_j |m_i - m_j| + 1/3 sum w_i^2 delta_i

over the samples up to the first with T_i < early_stop_eps (N. Max, "Optical models for direct volume rendering", 1995;
the distortion L is equation 15 of Mip-NeRF 360, 2022). Samples ascend along a ray, so L is a sum of positive terms,
2 sum w_i E_i + ..., with E_i = E_{i-1} + (sum_{j<i} w_j) (m_i - m_{i-1}).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

DEPTHS = ("expected", "normalized", "median")
OPACITY_FLOOR = 2.0**-23  # "normalized" divides by at least this


class _March(NamedTuple):
    """Dense rays in the working dtype, R x S; whatever a sample that is not composited held reads as 0."""

    inside: Tensor | None  # [R, S] bool: where the packed samples lie; None where rays came dense
    live: Tensor  # [R, S] bool: composited
    features: Tensor  # [R, S, N]
    sigmas: Tensor | None  # [R, S]
    mids: Tensor  # [R, S]
    deltas: Tensor  # [R, S]
    alphas: Tensor  # [R, S]
    keeps: Tensor  # [R, S], 1 - alpha
    trans: Tensor  # [R, S + 1]: in front of every sample, then behind the last


def composite(
    sigmas: Tensor | None,  # [n_rays, n_samples], or [total] with ray_offsets; None where alphas are given
    features: Tensor,  # [..., N], the leading sizes those of the samples
    t_starts: Tensor,  # as the samples
    t_ends: Tensor,  # as the samples
    alphas: Tensor | None,  # as the samples; None where sigmas are given
    ray_offsets: Tensor | None,  # [n_rays + 1] int64: ray r owns the samples ray_offsets[r] to ray_offsets[r + 1]
    background: Tensor | None,  # [N] or [n_rays, N]
    prefix_trans: Tensor | None,  # [n_rays]
    early_stop_eps: float,
    depth: str,  # "expected", "normalized" or "median"
    return_weights: bool,
    distortion: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(features [n_rays, N], depth, opacity, weights, distortion), the last two of size 0 where not asked for.

    Half inputs are worked on in float32 and rounded once at the end. Features come back in their own dtype, depth and
    distortion in that of t_starts, opacity and weights in that of sigmas or alphas.
    """
    rays = _march(sigmas, features, t_starts, t_ends, alphas, ray_offsets, prefix_trans, early_stop_eps)
    weights = rays.trans[:, :-1] * rays.alphas
    color = torch.einsum("rs,rsn->rn", weights, rays.features)
    if background is not None:
        color = color + rays.trans[:, -1:] * background.to(color.dtype)
    opacity = weights.sum(-1)

    if depth == "median":  # the first sample behind which half of the light is gone, else the last
        middle = (rays.live & (rays.trans[:, 1:] > 0.5)).sum(-1).minimum(rays.live.sum(-1) - 1)
        chosen = torch.arange(weights.shape[1], device=weights.device) == middle[:, None]
        along = (rays.mids * chosen).sum(-1).detach()
    else:
        along = (weights * rays.mids).sum(-1)
        if depth == "normalized":
            along = along / opacity.clamp(min=OPACITY_FLOOR)

    held = features.new_empty(0)
    if distortion:
        spread = _reach(weights, rays.mids)[0]
        held = (2 * weights * spread + weights.square() * rays.deltas / 3).sum(-1)

    density = alphas if sigmas is None else sigmas
    assert density is not None
    packed = _unpad(weights, rays) if return_weights else features.new_empty(0)
    return (
        color.to(features.dtype),
        along.to(t_starts.dtype),
        opacity.to(density.dtype),
        packed.to(density.dtype),
        held.to(t_starts.dtype),
    )


def composite_backward(
    grad_features: Tensor | None,  # [n_rays, N]; None stands for zeros, here and below
    grad_depth: Tensor | None,  # [n_rays]
    grad_opacity: Tensor | None,  # [n_rays]
    grad_weights: Tensor | None,  # as the samples
    grad_distortion: Tensor | None,  # [n_rays]
    sigmas: Tensor | None,  # from here on as in composite()
    features: Tensor,
    t_starts: Tensor,
    t_ends: Tensor,
    alphas: Tensor | None,
    ray_offsets: Tensor | None,
    background: Tensor | None,
    prefix_trans: Tensor | None,
    early_stop_eps: float,
    depth: str,
    needs: list[bool],  # which of the seven gradients below are wanted
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients to (sigmas, features, t_starts, t_ends, alphas, background, prefix_trans), size 0 where not wanted.

    With G_i = dL/dw_i, a recursion from the far end, B_{i-1} = alpha_i G_i + (1 - alpha_i) B_i from B_end = dL/dT_end,
    gives dL/dalpha_i = T_i (G_i - B_i), dL/dtau_i = T_{i+1} (G_i - B_i) and, at its near end, dL/dprefix_trans. It
    divides by nothing, so it is exact where alpha is 1. A median depth has no gradient, nor have truncated samples.
    """
    rays = _march(sigmas, features, t_starts, t_ends, alphas, ray_offsets, prefix_trans, early_stop_eps)
    weights = rays.trans[:, :-1] * rays.alphas
    n_rays, n_channels = weights.shape[0], features.shape[-1]

    def ray_grad(grad: Tensor | None, *shape: int) -> Tensor:
        return weights.new_zeros(shape) if grad is None else grad.to(weights.dtype).reshape(shape)

    on_color = ray_grad(grad_features, n_rays, n_channels)
    on_depth = ray_grad(None if depth == "median" else grad_depth, n_rays, 1)
    on_opacity = ray_grad(grad_opacity, n_rays, 1)
    on_spread = ray_grad(grad_distortion, n_rays, 1)
    if depth == "normalized":
        opacity = weights.sum(-1, keepdim=True)
        along = (weights * rays.mids).sum(-1, keepdim=True)
        on_depth = on_depth / opacity.clamp(min=OPACITY_FLOOR)
        on_opacity = on_opacity - torch.where(opacity >= OPACITY_FLOOR, on_depth * along / opacity, 0)

    on_weights = torch.einsum("rn,rsn->rs", on_color, rays.features) + on_depth * rays.mids + on_opacity
    if grad_weights is not None:
        on_weights = on_weights + torch.where(rays.live, _pad(grad_weights.to(weights.dtype), ray_offsets)[0], 0)
    on_mids = on_depth * weights
    on_deltas = torch.zeros_like(weights)
    if grad_distortion is not None:
        before, behind = _reach(weights, rays.mids)
        in_front, at_back = _exclusive_sums(weights)
        on_weights = on_weights + on_spread * (2 * (before + behind) + 2 / 3 * weights * rays.deltas)
        on_mids = on_mids + on_spread * 2 * weights * (in_front - at_back)
        on_deltas = on_deltas + on_spread * weights.square() / 3

    left_over = weights.new_zeros(n_rays)
    if background is not None:
        left_over = (on_color * background.to(weights.dtype)).sum(-1)
    ladder = _far_to_near(rays.alphas * on_weights, rays.keeps, left_over)
    gain = on_weights - ladder[:, 1:]
    on_tau = rays.trans[:, 1:] * gain
    if rays.sigmas is not None:
        on_deltas = on_deltas + rays.sigmas * on_tau

    def want(index: int, like: Tensor | None, make) -> Tensor:
        if like is None or not needs[index]:
            return features.new_empty(0)
        return make().to(like.dtype)

    def on_background() -> Tensor:
        grad = rays.trans[:, -1:] * on_color
        return grad.sum(0) if background is not None and background.dim() == 1 else grad

    return (
        want(0, sigmas, lambda: _unpad(rays.deltas * on_tau, rays)),
        want(1, features, lambda: _unpad(weights[..., None] * on_color[:, None], rays)),
        want(2, t_starts, lambda: _unpad(on_mids / 2 - on_deltas, rays)),
        want(3, t_ends, lambda: _unpad(on_mids / 2 + on_deltas, rays)),
        want(4, alphas, lambda: _unpad(rays.trans[:, :-1] * gain, rays)),
        want(5, background, on_background),
        want(6, prefix_trans, lambda: ladder[:, 0]),
    )


def offsets_error(ray_offsets: Tensor, total: int) -> str | None:
    """What is wrong with the offsets of packed rays, or None."""
    edges = (int(ray_offsets[0]), int(ray_offsets[-1]))
    if edges != (0, total):
        return f"ray_offsets runs from {edges[0]} to {edges[1]}, expected 0 to the number of samples, {total}"
    down = (ray_offsets.diff() < 0).nonzero()
    if down.numel():
        r = int(down[0])
        pair = (int(ray_offsets[r]), int(ray_offsets[r + 1]))
        return f"ray_offsets falls from {pair[0]} to {pair[1]} at ray {r}, expected ascending values"
    return None


def _march(sigmas, features, t_starts, t_ends, alphas, ray_offsets, prefix_trans, early_stop_eps) -> _March:
    if ray_offsets is not None and ray_offsets.is_cpu and (why := offsets_error(ray_offsets, t_starts.shape[0])):
        raise ValueError(why)
    given = [x for x in (sigmas, features, t_starts, t_ends, alphas, prefix_trans) if x is not None]
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in given) else torch.float32
    (features, inside), t_starts, t_ends = (
        _pad(features.to(dtype), ray_offsets),
        _pad(t_starts.to(dtype), ray_offsets)[0],
        _pad(t_ends.to(dtype), ray_offsets)[0],
    )
    sigmas = None if sigmas is None else _pad(sigmas.to(dtype), ray_offsets)[0]
    alphas = None if alphas is None else _pad(alphas.to(dtype), ray_offsets)[0]
    prefix = t_starts.new_ones(t_starts.shape[0]) if prefix_trans is None else prefix_trans.to(dtype)

    def attenuate(live: Tensor | None):
        def lit(x):
            return x if live is None else torch.where(live if x.dim() == 2 else live[..., None], x, 0)

        deltas = lit(t_ends) - lit(t_starts)
        if sigmas is None:
            thick, alpha = None, lit(alphas)
            keep = 1 - alpha
        else:
            thick = lit(sigmas).clamp(max=torch.finfo(dtype).max)  # an infinite sigma of no length absorbs nothing
            alpha, keep = -torch.expm1(-thick * deltas), torch.exp(-thick * deltas)
        trans = torch.cumprod(torch.cat([prefix[:, None], keep], 1), 1)
        return lit, thick, deltas, alpha, keep, trans

    with torch.no_grad():
        trans = attenuate(None)[-1]
        live = torch.cumsum(~(trans[:, :-1] >= early_stop_eps), 1) == 0
        if inside is not None:
            live = live & inside
    lit, thick, deltas, alpha, keep, trans = attenuate(live)
    mids = (lit(t_starts) + lit(t_ends)) / 2
    return _March(inside, live, lit(features), thick, mids, deltas, alpha, keep, trans)


def _pad(x: Tensor, ray_offsets: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Packed samples [total, ...] as [n_rays, longest, ...] and where they lie; dense ones as they are."""
    if ray_offsets is None:
        return x, None
    counts = ray_offsets.diff()
    longest = int(counts.max()) if counts.numel() else 0
    steps = torch.arange(longest, device=x.device)
    inside = steps < counts[:, None]
    index = torch.where(inside, ray_offsets[:-1, None] + steps, 0)
    return x[index], inside


def _unpad(x: Tensor, rays: _March) -> Tensor:
    x = torch.where(rays.live if x.dim() == 2 else rays.live[..., None], x, 0)
    return x if rays.inside is None else x[rays.inside]


def _exclusive_sums(x: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over what lies in front of every sample and over what lies behind it, [R, S] each."""
    edge = x.new_zeros(x.shape[0], 1)
    in_front = torch.cat([edge, x], 1).cumsum(1)[:, :-1]
    at_back = torch.cat([x, edge], 1).flip(1).cumsum(1).flip(1)[:, 1:]
    return in_front, at_back


def _reach(weights: Tensor, mids: Tensor) -> tuple[Tensor, Tensor]:
    """sum_{j<i} w_j (m_i - m_j) and sum_{j>i} w_j (m_j - m_i), with every term of either sum positive."""
    in_front, at_back = _exclusive_sums(weights)
    gaps = mids.diff(dim=1, prepend=mids[:, :1])
    return (in_front * gaps).cumsum(1), _exclusive_sums((at_back + weights) * gaps)[1]


def _far_to_near(values: Tensor, keeps: Tensor, last: Tensor) -> Tensor:
    """X_i = values_i + keeps_i X_{i+1} down from X_S = last, [R, S + 1], in log2(S) steps."""
    total = torch.cat([values, last[:, None]], 1)
    scale = torch.cat([keeps, torch.zeros_like(last)[:, None]], 1)
    step = 1
    while step < total.shape[1]:
        total = total + scale * torch.nn.functional.pad(total[:, step:], (0, step))
        scale = scale * torch.nn.functional.pad(scale[:, step:], (0, step))
        step *= 2
    return total
