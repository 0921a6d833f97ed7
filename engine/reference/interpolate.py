"""Straight lines and great circles between vectors [B, G, n] in plain PyTorch: the definition of `interpolate`.

What a whole vector decides (lengths, the angle, its sines) is float64, so that no length overflows or vanishes in a
square; a straight line is torch.lerp's in float32, or in float64 of float64.
"""
from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

PARALLEL = 1e-4         # radians from 0 or from pi inside which the direction of a great circle is lost in rounding


def _operands(
    start: Tensor, weight: float, weights: Tensor | None, *others: Tensor
) -> tuple[Tensor, ...]:        # (t [B or 1, 1, 1], start, others...), in float32 at least
    kind = torch.float64 if start.dtype == torch.float64 else torch.float32
    t = start.new_full((1, 1, 1), weight, dtype=kind) if weights is None else weights.to(kind).reshape(-1, 1, 1)
    return t, *(x.to(kind) for x in (start, *others))


class _Pair(NamedTuple):
    """Two vectors in float64: numbers of each pair are [B, G, 1]; those of pairs without an angle are 1."""

    size_a: Tensor
    size_b: Tensor
    u: Tensor           # start, of length 1
    v: Tensor           # end
    angle: Tensor
    straight: Tensor    # parallel, of length 0 or not finite
    opposite: Tensor


def _pair(a: Tensor, b: Tensor) -> _Pair:
    a, b = a.double(), b.double()
    length = lambda x: torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    size_a, size_b = length(a), length(b)
    usable = (size_a > 0) & (size_b > 0) & size_a.isfinite() & size_b.isfinite()
    size_a, size_b = torch.where(usable, size_a, 1.0), torch.where(usable, size_b, 1.0)
    u, v = torch.where(usable, a, 1.0) / size_a, torch.where(usable, b, 1.0) / size_b
    # Twice the angle of half a rhombus: exact for small angles and for those near pi, where acos loses half its digits.
    angle = 2 * torch.atan2(length(u - v), length(u + v))
    straight = ~usable | (angle < PARALLEL)
    opposite = usable & (angle > math.pi - PARALLEL)
    return _Pair(size_a, size_b, u, v, torch.where(straight | opposite, 1.0, angle), straight, opposite)


def _axis(u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The axis in which u is smallest, u there, and 1 / the length of the axis less its part along u (0 of n = 1)."""
    index = u.abs().argmin(-1, keepdim=True)
    there = u.gather(-1, index)
    rest = 1 - there.square()
    inverse = torch.where(rest > 0, rest.clamp_min(1e-300).rsqrt(), 0.0)
    return torch.zeros_like(u).scatter_(-1, index, 1.0), there, inverse


def interpolate(start: Tensor, end: Tensor, weight: float, weights: Tensor | None, arc: bool) -> Tensor:
    t, a, b = _operands(start, weight, weights, end)
    path = torch.lerp(a, b, t.expand_as(a))
    if arc:
        x, wide = _pair(a, b), t.double()
        circle = (torch.sin((1 - wide) * x.angle) * a + torch.sin(wide * x.angle) * b) / torch.sin(x.angle)
        axis, there, inverse = _axis(x.u)
        turn = math.pi * wide
        over = torch.cos(turn) * x.u + torch.sin(turn) * inverse * (axis - there * x.u)
        half = over * ((1 - wide) * x.size_a + wide * x.size_b)
        path = torch.where(x.straight, path, torch.where(x.opposite, half, circle).to(path.dtype))
    return torch.where(t == 0, a, torch.where(t == 1, b, path)).to(start.dtype).contiguous()


def interpolate_backward(
    grad: Tensor, start: Tensor, end: Tensor, weight: float, weights: Tensor | None, arc: bool, weight_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Of start, of end, and of weights where asked for."""
    t, a, b, g = _operands(start, weight, weights, end, grad)
    t, a, b, g = t.double(), a.double(), b.double(), g.double()
    on_a, on_b = (1 - t) * g, t * g
    on_t = (g * (b - a)).sum(-1, keepdim=True)
    if arc:
        straight, *curved = _curved(_pair(a, b), a, b, g, t)
        on_a, on_b, on_t = (torch.where(straight, x, y) for x, y in zip((on_a, on_b, on_t), curved, strict=True))
    nothing = torch.zeros_like(g)
    on_a = torch.where(t == 0, g, torch.where(t == 1, nothing, on_a))
    on_b = torch.where(t == 1, g, torch.where(t == 0, nothing, on_b))
    on_t = torch.where((t == 0) | (t == 1), 0.0, on_t)
    narrow = lambda x: x.to(start.dtype).contiguous()
    if not weight_grad or weights is None:
        return narrow(on_a), narrow(on_b), start.new_zeros(0, dtype=torch.float32)
    on_weights = on_t.sum() if weights.dim() == 0 else on_t.sum((1, 2))
    return narrow(on_a), narrow(on_b), on_weights.to(weights.dtype)


def _curved(x: _Pair, a: Tensor, b: Tensor, g: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(where the line is straight, the gradients of start, end and weight where it is not)"""
    dot = lambda y: (g * y).sum(-1, keepdim=True)
    w, sine, cosine = x.angle, torch.sin(x.angle), torch.cos(x.angle)
    at_a, at_b = (1 - t) * w, t * w
    ca, cb = torch.sin(at_a) / sine, torch.sin(at_b) / sine
    ga, gb = dot(a), dot(b)
    on_angle = (((1 - t) * torch.cos(at_a) - ca * cosine) * ga + (t * torch.cos(at_b) - cb * cosine) * gb) / sine
    on_a = ca * g + on_angle / (sine * x.size_a) * (cosine * x.u - x.v)
    on_b = cb * g + on_angle / (sine * x.size_b) * (cosine * x.v - x.u)
    on_t = w / sine * (torch.cos(at_b) * gb - torch.cos(at_a) * ga)

    # Half a turn: a length times cos(pi t) u + sin(pi t) side(u), side = (axis - u_k u) / |axis - u_k u|.
    axis, there, inverse = _axis(x.u)
    cos, sin = torch.cos(math.pi * t), torch.sin(math.pi * t)
    size = (1 - t) * x.size_a + t * x.size_b
    gu = dot(x.u)
    across = (dot(axis) - there * gu) * inverse             # g along the side
    along = cos * gu + sin * across                         # g along the result
    straight_on, to_axis = cos - sin * inverse * there, sin * inverse * (across * inverse * there - gu)
    pulled = straight_on * g + to_axis * axis               # the gradient of u
    back = straight_on * gu + to_axis * there
    half_a = size / x.size_a * (pulled - back * x.u) + (1 - t) * along * x.u
    half_b = t * along * x.v
    half_t = (x.size_b - x.size_a) * along + size * math.pi * (cos * across - sin * gu)
    choose = lambda half, circle: torch.where(x.opposite, half, circle)
    return x.straight, choose(half_a, on_a), choose(half_b, on_b), choose(half_t, on_t)
