"""Straight lines and great circles between vectors in Triton, forward and backward.

Bytes: both operands are read once and the path written once (12 an element in float32); backward reads the gradient too
and writes two (20). A program takes R short vectors, or one of up to 2048 elements, sums and elements in one launch. A
longer vector that bends is read twice, the second time from the cache: one launch gives sums of at most 256 parts, a
second adds them and writes. Parts follow from the vector's length alone, and so does the order of its sums. Angles,
sums and coefficients are float64, as in csrc/include/onepass/great_circle.h.
"""
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._host import OPTIONS, VECTOR, aligned, on, power_of_two, rows_of

_THREADS = 128      # of a program of short vectors: each reads once, so that it has the numbers of one vector
_WHOLE = 2048       # elements that a program holds at a time: the longest vector that is read once
_PARTS = 256        # most parts of a longer one
_PLANES: tl.constexpr = tl.constexpr(6)     # of a part: a a, b b, a b, g a, g b, and the smallest |a|
_PI: tl.constexpr = tl.constexpr(3.14159265358979323846)
_PARALLEL: tl.constexpr = tl.constexpr(1e-4)
_RAW = ["vectors", "groups", "units", "tiles", "span", "a_step", "b_step", "grad_step", "weight_step"]


@triton.jit
def _sin_pi(x):
    """sin(pi x) of float64 within 1e-15: Taylor's, to the 23rd power."""
    whole = tl.floor(x + 0.5)
    y = _PI * (x - whole)
    z = y * y
    p = z * (-1.0 / 25852016738884976640000.0) + 1.0 / 51090942171709440000.0
    p = p * z - 1.0 / 121645100408832000.0
    p = p * z + 1.0 / 355687428096000.0
    p = p * z - 1.0 / 1307674368000.0
    p = p * z + 1.0 / 6227020800.0
    p = p * z - 1.0 / 39916800.0
    p = p * z + 1.0 / 362880.0
    p = p * z - 1.0 / 5040.0
    p = p * z + 1.0 / 120.0
    p = p * z - 1.0 / 6.0
    sine = y + y * z * p
    half = whole * 0.5
    return tl.where(tl.floor(half) == half, sine, -sine)


@triton.jit
def _angle(cosine, sine):
    """In radians, of a cosine and a sine of at least 0: three times its half, then Taylor's arctangent."""
    h = sine / (cosine + 1.0)
    h = h / (tl.sqrt(h * h + 1.0) + 1.0)
    h = h / (tl.sqrt(h * h + 1.0) + 1.0)
    z = h * h
    p = z * (-1.0 / 23.0) + 1.0 / 21.0
    p = 1.0 / 19.0 - z * p
    p = 1.0 / 17.0 - z * p
    p = 1.0 / 15.0 - z * p
    p = 1.0 / 13.0 - z * p
    p = 1.0 / 11.0 - z * p
    p = 1.0 / 9.0 - z * p
    p = 1.0 / 7.0 - z * p
    p = 1.0 / 5.0 - z * p
    p = 1.0 / 3.0 - z * p
    return 8.0 * (h - h * z * p)


@triton.jit
def _pair(aa, bb, ab):
    """(straight, opposite, length of a, of b, angle in units of pi, its sine, its cosine); what has no length is
    straight."""
    usable = (aa > 0) & (bb > 0) & (aa < float("inf")) & (bb < float("inf"))
    aa, bb, ab = tl.where(usable, aa, 1.0), tl.where(usable, bb, 1.0), tl.where(usable, ab, 1.0)
    size_a, size_b = tl.sqrt(aa), tl.sqrt(bb)
    product = size_a * size_b
    square = aa * bb - ab * ab
    cosine = ab / product
    sine = tl.sqrt(tl.where(square > 0, square, 0.0)) / product
    near = _angle(tl.abs(cosine), sine)
    straight = (near < _PARALLEL) & (cosine > 0)
    opposite = (near < _PARALLEL) & (cosine < 0)
    turn = near / _PI
    sine = tl.where(straight | opposite, 1.0, sine)
    return straight, opposite, size_a, size_b, tl.where(cosine < 0, 1.0 - turn, turn), sine, cosine


@triton.jit
def _place(vector, step, groups, length, UNIT: tl.constexpr):
    """Where vectors begin: `groups` lie one behind the other, `step` units lead to the next row of them."""
    row = vector // groups
    return row * step * UNIT + (vector - row * groups) * length


@triton.jit
def _load(X, begin, col, inside):
    return tl.load(X + begin[:, None] + col[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _sums(a, b, g, GRAD: tl.constexpr, ARC: tl.constexpr):
    """Of each vector: a a, b b, a b, g a, g b; zeros for those that nothing asks for."""
    a, b = a.to(tl.float64), b.to(tl.float64)
    nothing = tl.zeros([a.shape[0]], tl.float64)
    aa, bb, ab, ga, gb = nothing, nothing, nothing, nothing, nothing
    if ARC:
        aa, bb, ab = tl.sum(a * a, 1), tl.sum(b * b, 1), tl.sum(a * b, 1)
    if GRAD:
        g = g.to(tl.float64)
        ga, gb = tl.sum(g * a, 1), tl.sum(g * b, 1)
    return aa, bb, ab, ga, gb


@triton.jit
def _smallest(a, col, inside, length):
    """(|a| of the axis in which each vector is smallest, the first of equals; that axis)"""
    size = tl.where(inside, tl.abs(a), float("inf"))
    least = tl.min(size, 1)
    return least, tl.min(tl.where(size == least[:, None], col[None, :], length - 1), 1)


@triton.jit(do_not_specialize=_RAW)
def sum_parts(
    A, a_step, B, b_step, Grad, grad_step, Sums, Axes, groups, units, tiles, span,
    ARC: tl.constexpr, UNIT: tl.constexpr, C: tl.constexpr,
):
    """Sums of one of the `tiles` parts of a vector, `span` times C elements."""
    length = units.to(tl.int64) * UNIT
    vector = (tl.program_id(0) // tiles).to(tl.int64) + tl.arange(0, 1)
    tile = (tl.program_id(0) % tiles).to(tl.int64)
    from_a = _place(vector, a_step, groups, length, UNIT)
    from_b = _place(vector, b_step, groups, length, UNIT)
    aa = tl.zeros([1], tl.float64)
    bb, ab, ga, gb = aa, aa, aa, aa
    least = tl.full([1], float("inf"), tl.float32)
    axis = tl.zeros([1], tl.int64)
    for i in range(0, span):
        col = (tile * span + i) * C + tl.arange(0, C)
        inside = (col < length)[None, :]
        a = _load(A, from_a, col, inside)
        b = _load(B, from_b, col, inside)
        if Grad is not None:
            g = _load(Grad, _place(vector, grad_step, groups, length, UNIT), col, inside)
            more = _sums(a, b, g, True, ARC)
        else:
            more = _sums(a, b, a, False, ARC)
        aa, bb, ab, ga, gb = aa + more[0], bb + more[1], ab + more[2], ga + more[3], gb + more[4]
        if ARC:
            own, at = _smallest(a, col, inside, length)
            axis = tl.where(own < least, at, axis)
            least = tl.where(own < least, own, least)
    to = vector * tiles * _PLANES + tile
    tl.store(Sums + to, aa)
    tl.store(Sums + to + tiles, bb)
    tl.store(Sums + to + 2 * tiles, ab)
    tl.store(Sums + to + 3 * tiles, ga)
    tl.store(Sums + to + 4 * tiles, gb)
    tl.store(Sums + to + 5 * tiles, least.to(tl.float64))
    tl.store(Axes + vector * tiles + tile, axis)


@triton.jit
def _joined(Sums, Axes, vector, parts, T: tl.constexpr):
    """The sums of each vector and its smallest axis, from those of its parts."""
    of = tl.arange(0, T)[None, :]
    there = of < parts
    at = (vector * parts)[:, None] * _PLANES + of
    aa = tl.sum(tl.load(Sums + at, mask=there, other=0.0), 1)
    bb = tl.sum(tl.load(Sums + at + parts, mask=there, other=0.0), 1)
    ab = tl.sum(tl.load(Sums + at + 2 * parts, mask=there, other=0.0), 1)
    ga = tl.sum(tl.load(Sums + at + 3 * parts, mask=there, other=0.0), 1)
    gb = tl.sum(tl.load(Sums + at + 4 * parts, mask=there, other=0.0), 1)
    sizes = tl.load(Sums + at + 5 * parts, mask=there, other=float("inf"))
    axes = tl.load(Axes + (vector * parts)[:, None] + of, mask=there, other=0)
    found = there & (sizes == tl.min(sizes, 1)[:, None])
    return aa, bb, ab, ga, gb, tl.min(tl.where(found, axes, 0x7FFFFFFFFFFFFFFF), 1)


@triton.jit(do_not_specialize=_RAW)
def path_tiles(
    A, a_step, B, b_step, Grad, grad_step, Out, OutB, Weights, weight, weight_step, OnWeight, Sums, Axes,
    vectors, groups, units, tiles, parts,
    ARC: tl.constexpr, SUMMED: tl.constexpr, T: tl.constexpr, UNIT: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):
    """The path, or the gradients of both operands where there is Grad. SUMMED: the coefficients need sums, of T parts
    that sum_parts has seen, or of the tile where T is 0. OnWeight: the weight's gradient, a number a vector."""
    length = units.to(tl.int64) * UNIT
    tile = (tl.program_id(0) % tiles).to(tl.int64)
    mine = (tl.program_id(0) // tiles).to(tl.int64) * R + tl.arange(0, R)
    vector = tl.minimum(mine, vectors - 1)
    col = tile * C + tl.arange(0, C)
    inside = (col < length)[None, :]
    from_a = _place(vector, a_step, groups, length, UNIT)
    a = _load(A, from_a, col, inside)
    b = _load(B, _place(vector, b_step, groups, length, UNIT), col, inside)
    t = tl.zeros([R], tl.float32) + weight
    if Weights is not None:
        t = tl.load(Weights + vector // groups * weight_step)
    g = a
    GRAD: tl.constexpr = Grad is not None
    if GRAD:
        from_g = _place(vector, grad_step, groups, length, UNIT)
        g = _load(Grad, from_g, col, inside)
    if SUMMED:
        if T:
            aa, bb, ab, ga, gb, axis = _joined(Sums, Axes, vector, parts, T)
        else:
            aa, bb, ab, ga, gb = _sums(a, b, g, GRAD, ARC)
            _least, axis = _smallest(a, col, inside, length)
    written = inside & (mine < vectors)[:, None]
    to = (vector * length)[:, None] + col[None, :]
    at_start, at_end = (t == 0.0)[:, None], (t == 1.0)[:, None]
    s = t[:, None]
    ends = (t == 0.0) | (t == 1.0)
    if ARC:
        axis = tl.minimum(axis, length - 1)
        straight, opposite, size_a, size_b, angle, sine, cosine = _pair(aa, bb, ab)
        w = t.to(tl.float64)
        v = 1.0 - w
        ca, cb = _sin_pi(v * angle) / sine, _sin_pi(w * angle) / sine
        there = tl.load(A + from_a + axis).to(tl.float64) / size_a
        rest = 1.0 - there * there
        inverse = tl.where(rest > 0, 1.0 / tl.sqrt(tl.where(rest > 0, rest, 1.0)), 0.0)
        sin_half, cos_half = _sin_pi(w), _sin_pi(w + 0.5)
        size = v * size_a + w * size_b
        main = cos_half - sin_half * inverse * there        # what half a turn leaves of the direction of start
        here = col[None, :] == axis[:, None]
    if not GRAD:
        near = tl.abs(s) < 0.5
        path = tl.fma(tl.where(near, s, s - 1.0), b - a, tl.where(near, a, b))
        if ARC:
            ca = tl.where(opposite, main * size / size_a, ca).to(tl.float32)[:, None]
            cb = tl.where(opposite, 0.0, cb).to(tl.float32)[:, None]
            extra = tl.where(opposite, sin_half * inverse * size, 0.0).to(tl.float32)[:, None]
            bent = tl.fma(ca, a, cb * b) + tl.where(here, extra, 0.0)
            path = tl.where(straight[:, None], path, bent)
        path = tl.where(at_start, a, tl.where(at_end, b, path))
        tl.store(Out + to, path.to(Out.dtype.element_ty), mask=written)
    else:
        on_a, on_b = (1.0 - s) * g, s * g
        if SUMMED:
            on_t = gb - ga
        if ARC:
            cos_a, cos_b = _sin_pi(v * angle + 0.5), _sin_pi(w * angle + 0.5)
            on_angle = ((v * cos_a - ca * cosine) * ga + (w * cos_b - cb * cosine) * gb) / sine / sine
            other = -on_angle / (size_a * size_b)
            g_there = tl.load(Grad + from_g + axis).to(tl.float64)
            gu = ga / size_a
            across = (g_there - there * gu) * inverse
            along = cos_half * gu + sin_half * across
            to_axis = sin_half * inverse * (across * inverse * there - gu)
            back = main * gu + to_axis * there
            scale = size / size_a
            g_a = tl.where(opposite, scale * main, ca).to(tl.float32)[:, None]
            own = on_angle * cosine
            a_a = tl.where(opposite, (v * along - scale * back) / size_a, own / aa).to(tl.float32)[:, None]
            mixed = tl.where(opposite, 0.0, other).to(tl.float32)[:, None]
            g_b = tl.where(opposite, 0.0, cb).to(tl.float32)[:, None]
            b_b = tl.where(opposite, w * along / size_b, own / bb).to(tl.float32)[:, None]
            extra = tl.where(opposite, scale * to_axis, 0.0).to(tl.float32)[:, None]
            bent = tl.fma(g_a, g, tl.fma(a_a, a, mixed * b)) + tl.where(here, extra, 0.0)
            on_a = tl.where(straight[:, None], on_a, bent)
            bent = tl.fma(g_b, g, tl.fma(b_b, b, mixed * a))
            on_b = tl.where(straight[:, None], on_b, bent)
            turned = _PI * angle / sine * (cos_b * gb - cos_a * ga)
            halved = (size_b - size_a) * along + size * _PI * (cos_half * across - sin_half * gu)
            on_t = tl.where(straight, on_t, tl.where(opposite, halved, turned))
        on_a = tl.where(at_start, g, tl.where(at_end, 0.0, on_a))
        on_b = tl.where(at_end, g, tl.where(at_start, 0.0, on_b))
        tl.store(Out + to, on_a.to(Out.dtype.element_ty), mask=written)
        tl.store(OutB + to, on_b.to(OutB.dtype.element_ty), mask=written)
        if OnWeight is not None:
            tl.store(OnWeight + mine, tl.where(ends, 0.0, on_t), mask=(mine < vectors) & (tile == 0))


@triton.jit(do_not_specialize=["shares"])
def sum_vectors(OnWeight, Out, shares, BLOCK: tl.constexpr):
    """What the vectors of one weight say of it, in an order that their number gives."""
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float64)
    for i in range(0, shares, BLOCK):
        at = i + tl.arange(0, BLOCK)
        total += tl.load(OnWeight + row * shares + at, mask=at < shares, other=0.0)
    tl.store(Out + row, tl.sum(total, 0).to(tl.float32))


def _run(
    start: Tensor, end: Tensor, grad: Tensor | None, weight: float, weights: Tensor | None, arc: bool, out: Tensor,
    out_b: Tensor | None, on_weight: Tensor | None,
) -> None:
    rows, groups, n = start.shape
    unit = VECTOR // start.element_size() if aligned(start, n) else 1

    def operand(x: Tensor | None) -> tuple[Tensor | None, int]:
        if x is None:
            return None, 0
        x, step = rows_of(x, groups * n)
        return x, step // unit

    operands = [part for x in (start, end, grad) for part in operand(x)]
    t = None if weights is None else weights.float()
    c = min(power_of_two(n), _WHOLE)
    r = max(_THREADS * unit // c, 1)
    vectors, tiles = rows * groups, -(-n // c)
    summed = arc or on_weight is not None
    span = -(-tiles // _PARTS)
    parts = -(-tiles // span)
    constants: dict[str, Any] = {
        "ARC": arc, "UNIT": unit, "C": c, "num_warps": max(r * c // 256, 4), **OPTIONS,
    }
    sums = axes = None
    with on(start):
        if summed and tiles > 1:
            sums = torch.empty(vectors * parts * 6, dtype=torch.float64, device=start.device)
            axes = torch.empty(vectors * parts, dtype=torch.int64, device=start.device)
            sum_parts[(vectors * parts,)](*operands, sums, axes, groups, n // unit, parts, span, **constants)
        path_tiles[(-(-vectors // r) * tiles,)](
            *operands, out, out_b, t, weight, t.stride(0) if t is not None and t.dim() else 0, on_weight, sums, axes,
            vectors, groups, n // unit, tiles, parts, SUMMED=summed, T=power_of_two(parts) if sums is not None else 0,
            R=r, **constants,
        )


def forward(start: Tensor, end: Tensor, weight: float, weights: Tensor | None, arc: bool, out: None = None) -> Tensor:
    result = start.new_empty(start.shape)
    if result.numel():
        _run(start, end, None, weight, weights, arc, result, None, None)
    return result


def backward(
    grad: Tensor, start: Tensor, end: Tensor, weight: float, weights: Tensor | None, arc: bool, weight_grad: bool,
    out: None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    on_start, on_end = start.new_empty(start.shape), start.new_empty(start.shape)
    on_weights = each = None
    if weight_grad and weights is not None:
        on_weights = torch.zeros(weights.shape, dtype=torch.float32, device=start.device)
        each = torch.empty(start.shape[:2], dtype=torch.float64, device=start.device)
    if grad.numel():
        _run(start, end, grad, weight, weights, arc, on_start, on_end, each)
        if on_weights is not None and each is not None:
            with on(start):
                sum_vectors[(on_weights.numel(),)](each, on_weights, each.numel() // on_weights.numel(), BLOCK=1024,
                                                   num_warps=4, **OPTIONS)
    if on_weights is None or weights is None:
        return on_start, on_end, start.new_empty(0, dtype=torch.float32)
    return on_start, on_end, on_weights.to(weights.dtype)
