"""The join of partial attention in Triton, forward and backward.

Bytes: a part and its LSE are read once and the result is written once; the gradient reads the parts once too and writes
theirs. A program takes R rows of the result and walks over the parts, some at a time so that their loads are under way
together; a part that saw no key (LSE -inf) is not loaded. R, the tiles and the order of every sum follow from the
channels and the number of parts alone. The gradient needs each part's dot product with the result's gradient and their
weighted mean, in float64 as on the CPU: both stay in registers up to 64 parts (of 9 to 16 channels 32, of fewer 16),
with more a second launch takes the mean off.
"""
from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._host import OPTIONS, VECTOR, aligned, on, power_of_two
from ._keys import unit

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
_TILE = 512         # channels of all rows of a program
_CHANNELS = 1024    # of a row that are taken at a time
_LSES = 1024        # LSEs of all rows of a program that are held at a time
_PARTS = 64         # of a row likewise
_AHEAD = 8          # parts whose loads are under way together; backward half of them, in float32 a quarter
_RAW = ["rows", "parts", "length", "heads", "part", "batch", "step", "head", "lse_part", "lse_batch", "lse_head",
        "lse_step"]


@triton.jit
def _weight(x, top):
    """e^(x - top): 0 of a part without keys."""
    return tl.where(x == float("-inf"), 0.0, tl.exp2((x - top) * LOG2E))


@triton.jit
def _inverse(total):
    """1 / total, of rows without keys 1."""
    return tl.div_rn(total * 0.0 + 1.0, tl.where(total == 0, 1.0, total))


@triton.jit
def _rows(Sinks, lse_batch, lse_head, lse_step, rows, length, heads, R: tl.constexpr):
    """(which rows there are, rows of [B, S, H] kept below the last, their (b, i, h), where their LSE lies in a part of
    lses, and in [B, H, S]; what a sink gives to the largest)"""
    mine = tl.program_id(0).to(rows.dtype) * R + tl.arange(0, R)
    row = tl.minimum(mine, rows - 1)
    h, i, b = row % heads, row // heads % length, row // heads // length
    row, h, i, b = row.to(tl.int64), h.to(tl.int64), i.to(tl.int64), b.to(tl.int64)
    sink = tl.full([R], float("-inf"), tl.float32) if Sinks is None else tl.load(Sinks + h)
    return mine < rows, row, b, i, h, b * lse_batch + h * lse_head + i * lse_step, (b * heads + h) * length + i, sink


@triton.jit
def _lses(Lses, at, lse_part, first, parts, BN: tl.constexpr):
    """[R, BN] of parts first, first + 1, ...; -inf where there are none."""
    n = first + tl.arange(0, BN)
    from_lse = at[:, None] + n.to(tl.int64)[None, :] * lse_part
    return tl.load(Lses + from_lse, mask=(n < parts)[None, :], other=float("-inf"))


@triton.jit
def _whole(Lses, at, lse_part, parts, sink, BN: tl.constexpr):
    """(largest LSE, the sum of e^(lse - largest), what of it the sink gives)"""
    top = sink
    total = tl.where(sink == float("-inf"), 0.0, sink * 0.0 + 1.0).to(tl.float64)
    for first in range(0, parts, BN):
        x = _lses(Lses, at, lse_part, first, parts, BN)
        highest = tl.maximum(top, tl.max(x, 1))
        total = total * _weight(top, highest) + tl.sum(_weight(x, highest[:, None]).to(tl.float64), 1)
        top = highest
    return top, total.to(tl.float32), _weight(sink, top)


@triton.jit(do_not_specialize=_RAW)
def merge_parts(
    Outs, part, batch, step, head, Lses, lse_part, lse_batch, lse_head, lse_step, Sinks, Out, Lse, rows, parts, length,
    heads,
    D: tl.constexpr, UNIT: tl.constexpr, R: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, AHEAD: tl.constexpr,
):
    there, row, b, i, h, at_lse, to_lse, sink = _rows(Sinks, lse_batch, lse_head, lse_step, rows, length, heads, R)
    top, total, _of_sink = _whole(Lses, at_lse, lse_part, parts, sink, BN)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    written = there[:, None] & (d < D)[None, :]
    at = (b * batch + i * step + h * head)[:, None] * UNIT + d[None, :]
    acc = tl.zeros([R, BD], tl.float32)
    for first in range(0, parts, AHEAD):
        some = tl.zeros([R, BD], tl.float32)
        for ahead in tl.static_range(AHEAD):
            n = tl.cast(first + ahead, tl.int64)
            x = tl.load(Lses + at_lse + n * lse_part, mask=there & (n < parts), other=float("-inf"))
            weight = _weight(x, top)
            out = tl.load(Outs + n * part * UNIT + at, mask=written & (weight != 0)[:, None], other=0.0)
            some = tl.fma(weight[:, None], out.to(tl.float32), some)
        acc += some
    out = acc * _inverse(total)[:, None]
    tl.store(Out + row[:, None] * D + d[None, :], out.to(Out.dtype.element_ty), mask=written)
    lse = tl.where(total == 0, float("-inf"), top + tl.log(tl.where(total == 0, 1.0, total)))
    tl.store(Lse + to_lse, lse, mask=there & (tl.program_id(1) == 0))


@triton.jit
def _lse_gradients(Dlses, to, x, top, inverse, dots, shared, there, parts, first, rows, BN: tl.constexpr):
    """Stores those of parts first, first + 1, ...: w_n (dot_n + shared)."""
    n = first + tl.arange(0, BN)
    share = _weight(x, top[:, None]) * inverse[:, None]
    grad = tl.where(share == 0, 0.0, share * (dots + shared[:, None]).to(tl.float32))
    at = n.to(tl.int64)[None, :] * rows + to[:, None]
    tl.store(Dlses + at, grad, mask=there[:, None] & (n < parts)[None, :])


@triton.jit(do_not_specialize=_RAW)
def merge_parts_backward(
    Outs, part, batch, step, head, Lses, lse_part, lse_batch, lse_head, lse_step, Sinks, Grad, GradLse, Douts, Dlses,
    Dsinks, Means, rows, parts, length, heads,
    D: tl.constexpr, UNIT: tl.constexpr, R: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, AHEAD: tl.constexpr,
):
    """With Means a row's mean goes there, dot products go to Dlses, and subtract_means makes gradients of them."""
    there, row, b, i, h, at_lse, to_lse, sink = _rows(Sinks, lse_batch, lse_head, lse_step, rows, length, heads, R)
    top, total, of_sink = _whole(Lses, at_lse, lse_part, parts, sink, BN)
    inverse = _inverse(total)
    col = tl.arange(0, BD)
    at = (b * batch + i * step + h * head)[:, None] * UNIT
    if D <= BD:
        grad = tl.load(Grad + row[:, None] * D + col[None, :], mask=(col < D)[None, :], other=0.0)
    dots = tl.zeros([R, BN], tl.float32)
    mean = tl.zeros([R], tl.float64)
    for first in range(0, parts, AHEAD):
        for ahead in tl.static_range(AHEAD):
            n = tl.cast(first + ahead, tl.int64)
            x = tl.load(Lses + at_lse + n * lse_part, mask=there & (n < parts), other=float("-inf"))
            share = _weight(x, top) * inverse
            products = tl.zeros([R, BD], tl.float32)
            for begin in tl.static_range(0, D, BD):
                d = begin + col
                inside = (d < D)[None, :]
                if D > BD:
                    grad = tl.load(Grad + row[:, None] * D + d[None, :], mask=inside, other=0.0)
                read = there[:, None] & (share != 0)[:, None] & inside
                out = tl.load(Outs + n * part * UNIT + at + d[None, :], mask=read, other=0.0)
                wide = grad.to(tl.float32)
                products = tl.fma(wide, out.to(tl.float32), products)
                dout = tl.where((share == 0)[:, None], 0.0, share[:, None] * wide).to(Douts.dtype.element_ty)
                written = there[:, None] & (n < parts) & inside
                tl.store(Douts + (n * rows + row)[:, None] * D + d[None, :], dout, mask=written)
            dot = tl.where(share == 0, 0.0, tl.sum(products, 1))
            if Means is None:
                dots = tl.where((tl.arange(0, BN) == n)[None, :], dot[:, None], dots)
            else:
                mean += share.to(tl.float64) * dot
                tl.store(Dlses + n * rows + to_lse, dot, mask=there & (n < parts))
    if Means is None:
        x = _lses(Lses, at_lse, lse_part, 0, parts, BN)
        mean = tl.sum((_weight(x, top[:, None]) * inverse[:, None]).to(tl.float64) * dots, 1)
    on_lse = tl.zeros([R], tl.float32)
    if GradLse is not None:
        on_lse = tl.load(GradLse + to_lse)
    shared = on_lse - mean
    if Means is None:
        _lse_gradients(Dlses, to_lse, x, top, inverse, dots, shared, there, parts, 0, rows, BN)
    else:
        tl.store(Means + row, shared, mask=there)
    if Dsinks is not None:
        tl.store(Dsinks + to_lse, of_sink * inverse * shared.to(tl.float32), mask=there)


@triton.jit(do_not_specialize=_RAW)
def subtract_means(
    Lses, lse_part, lse_batch, lse_head, lse_step, Sinks, Dlses, Means, rows, parts, length, heads,
    R: tl.constexpr, BN: tl.constexpr,
):
    """Of many parts: from dot products in Dlses to gradients."""
    there, row, _b, _i, _h, at_lse, to_lse, sink = _rows(Sinks, lse_batch, lse_head, lse_step, rows, length, heads, R)
    top, total, _of_sink = _whole(Lses, at_lse, lse_part, parts, sink, BN)
    inverse = _inverse(total)
    shared = tl.load(Means + row)
    for first in range(0, parts, BN):
        x = _lses(Lses, at_lse, lse_part, first, parts, BN)
        dots = _lses(Dlses, to_lse, rows, first, parts, BN)
        _lse_gradients(Dlses, to_lse, x, top, inverse, dots, shared, there, parts, first, rows, BN)


def _on_wide(x: Tensor) -> tuple[Tensor, int]:
    """x, or a copy, whose rows lie in units of so many elements: of 16 bytes where the channels fill such.

    So the compiled variant is a function of dtype and channels alone, and a row's sums have one order.
    """
    wide = VECTOR // x.element_size()
    if not aligned(x, x.shape[-1]):
        return x, 1
    steps = (step for size, step in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1)
    if x.data_ptr() % VECTOR or any(step % wide for step in steps):
        return x.clone(memory_format=torch.contiguous_format), wide
    return x, wide


def _call(outs: Tensor, lses: Tensor, sinks: Tensor | None) -> tuple[tuple[Any, ...], tuple[int, ...], dict[str, Any]]:
    """What the kernels take first, the sizes that they take last, and how they are compiled."""
    leading = math.prod(outs.shape[1:-3])
    outs = unit(outs.reshape(outs.shape[0], leading, *outs.shape[-3:]))
    lses = lses.float().reshape(lses.shape[0], leading, *lses.shape[-2:])
    outs, step = _on_wide(outs)
    parts, _, length, heads, dim = outs.shape
    channels = min(power_of_two(dim), _CHANNELS)
    rows = max(1, min(64, _TILE // channels))
    options = {
        "D": dim, "UNIT": step, "R": rows, "BD": channels,
        "BN": min(power_of_two(parts), _PARTS, _LSES // rows), "num_warps": max(2, rows * channels // 256), **OPTIONS,
    }
    first = (
        outs, *(x // step for x in outs.stride()[:-1]), lses, *lses.stride(),
        None if sinks is None else sinks.float().contiguous(),
    )
    return first, (leading * length * heads, parts, length, heads), options


def forward(outs: Tensor, lses: Tensor, sinks: Tensor | None, out: None = None) -> tuple[Tensor, Tensor]:
    merged = outs.new_empty(outs.shape[1:])
    lse = torch.empty(lses.shape[1:], dtype=torch.float32, device=lses.device)
    if lse.numel():
        first, sizes, options = _call(outs, lses, sinks)
        grid = -(-sizes[0] // options["R"]), max(1, -(-options["D"] // options["BD"]))
        with on(outs):
            merge_parts[grid](*first, merged, lse, *sizes, AHEAD=min(power_of_two(sizes[1]), _AHEAD), **options)
    return merged, lse


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, outs: Tensor, lses: Tensor, out: Tensor, lse: Tensor,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    douts = outs.new_empty(outs.shape)
    dlses = torch.empty(lses.shape, dtype=torch.float32, device=lses.device)
    dsinks = None if sinks is None else torch.zeros(lse.shape, dtype=torch.float32, device=lses.device)
    if dlses.numel():
        first, sizes, options = _call(outs, lses, sinks)
        rows, parts = sizes[:2]
        held = parts <= options["BN"]
        means = None if held else torch.empty(rows, dtype=torch.float64, device=lses.device)
        grad, _ = _on_wide(grad_out.contiguous())
        ahead = 1 if options["D"] > options["BD"] else min(power_of_two(parts), _AHEAD // outs.element_size())
        grid = (-(-rows // options["R"]),)
        with on(outs):
            merge_parts_backward[grid](
                *first, grad, None if grad_lse is None else grad_lse.float().contiguous(), douts, dlses, dsinks, means,
                *sizes, AHEAD=ahead, **options,
            )
            if not held:
                subtract_means[grid](
                    *first[5:], dlses, means, *sizes, R=options["R"], BN=options["BN"], num_warps=2, **OPTIONS,
                )
    if sinks is None or dsinks is None:
        return douts, dlses.to(lses.dtype), outs.new_empty(0)
    dsinks = dsinks.movedim(-2, 0).flatten(1).sum(1, dtype=torch.float64)
    return douts, dlses.to(lses.dtype), dsinks.to(sinks.dtype)
