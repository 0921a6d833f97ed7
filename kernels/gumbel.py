"""The Gumbel softmax in Triton, forward and backward; the noise is drawn where it is used and never stored.

Bytes: logits are read once and the sample is written once (8 an element in float32; backward reads the gradient too,
12). A program takes R short rows, or a whole row of up to 8192 categories. A longer row is cut into tiles: one launch
gives each tile's largest number and sums, a second draws again, reads again and writes. R and the tiles follow from the
number of categories alone, and so does the order in which a row is summed.
"""
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._host import OPTIONS, VECTOR, aligned, key_arguments, keyed_by_row, on, power_of_two, rows_of
from ._math import exp
from .rng import _KEYS, GUMBEL, draw_tile, key_of

_BLOCKS = 256       # blocks of four categories that one program of short rows takes
_WHOLE_ROW = 2048   # blocks of the longest row that one program takes
_LONG = 1024        # blocks of a tile of a longer row
_RAW = ["rows", "units", "tiles", "keyed", "logits_step", "grad_step", *_KEYS]


@triton.jit
def _perturbed(
    Logits, logits_step, rows, units, tiles, keyed, tau,
    seed, Seeds, seeds_step, stream, Streams, streams_step, offset, Offsets, offsets_step,
    WHOLE: tl.constexpr, UNIT: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):
    """(tile, rows, the same kept below the last, categories, which of them there are, a row's length, (logits + noise)
    / tau, -inf where there are none)."""
    length = units.to(tl.int64) * UNIT
    tile = (tl.program_id(0) % tiles).to(tl.int64)
    mine = (tl.program_id(0) // tiles).to(tl.int64) * R + tl.arange(0, R)
    row = tl.minimum(mine, rows - 1)
    col = tile * (4 * C) + tl.arange(0, 4 * C)
    inside = (col < length)[None, :]
    group = row // keyed                            # rows that share a key count on
    s, t, o = key_of(group, seed, Seeds, seeds_step, stream, Streams, streams_step, offset, Offsets, offsets_step)
    start = ((row - group * keyed) * length)[:, None]
    noise = draw_tile(s[:, None], t[:, None], o[:, None], start, tile, col, GUMBEL, WHOLE, R, C)
    at = row[:, None] * logits_step * UNIT + col[None, :]
    x = tl.load(Logits + at, mask=inside, other=0.0).to(tl.float32)
    y = tl.div_rn(x + noise, tau)
    return tile, mine, row, col, inside, length, tl.where(inside, y, float("-inf"))


@triton.jit
def _first(found, col, length):
    """[R, 1]: the first category where `found`."""
    return tl.min(tl.where(found, col[None, :], length), 1)[:, None]


@triton.jit(do_not_specialize=_RAW)
def soften_tiles(
    Logits, logits_step, Grad, grad_step, Largest, Sum, Dot, First, rows, units, tiles, keyed, tau,
    seed: tl.int64, Seeds, seeds_step, stream: tl.int64, Streams, streams_step, offset: tl.int64, Offsets, offsets_step,
    WHOLE: tl.constexpr, UNIT: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):
    """Of a tile: its largest number, the sum of e^(y - largest), that times the gradient, its first largest."""
    tile, mine, row, col, inside, length, y = _perturbed(
        Logits, logits_step, rows, units, tiles, keyed, tau, seed, Seeds, seeds_step, stream, Streams, streams_step,
        offset, Offsets, offsets_step, WHOLE, UNIT, R, C,
    )
    top = tl.max(y, 1)[:, None]
    e = tl.where(inside, exp(y - tl.where(top == float("-inf"), 0.0, top)), 0.0)
    to = mine * tiles + tile
    tl.store(Largest + to[:, None], top, mask=(mine < rows)[:, None])
    tl.store(Sum + to, tl.sum(e, 1), mask=mine < rows)
    if Dot is not None:
        at = row[:, None] * grad_step * UNIT + col[None, :]
        grad = tl.load(Grad + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(Dot + to, tl.sum(grad * e, 1), mask=mine < rows)
    if First is not None:
        tl.store(First + to[:, None], _first(inside & (y == top), col, length), mask=(mine < rows)[:, None])


@triton.jit(do_not_specialize=_RAW)
def soften_rows(
    Logits, logits_step, Grad, grad_step, Out, Largest, Sum, Dot, First, rows, units, tiles, keyed, tau,
    seed: tl.int64, Seeds, seeds_step, stream: tl.int64, Streams, streams_step, offset: tl.int64, Offsets, offsets_step,
    HARD: tl.constexpr, WHOLE: tl.constexpr, UNIT: tl.constexpr, R: tl.constexpr, C: tl.constexpr, T: tl.constexpr,
):
    """The sample, or logits' gradient where there is Grad. T: the tiles of a row that soften_tiles has seen, or 0."""
    _tile, mine, row, col, inside, length, y = _perturbed(
        Logits, logits_step, rows, units, tiles, keyed, tau, seed, Seeds, seeds_step, stream, Streams, streams_step,
        offset, Offsets, offsets_step, WHOLE, UNIT, R, C,
    )
    if T:
        of = row[:, None] * tiles + tl.arange(0, T)[None, :]
        there = (tl.arange(0, T) < tiles)[None, :]
        tops = tl.load(Largest + of, mask=there, other=float("-inf"))
        top = tl.max(tops, 1)[:, None]
        scale = tl.where(there, exp(tops - top), 0.0)
        total = tl.sum(scale * tl.load(Sum + of, mask=there, other=0.0), 1)[:, None]
    else:
        top = tl.max(y, 1)[:, None]
    e = exp(y - top)
    if not T:
        total = tl.sum(tl.where(inside, e, 0.0), 1)[:, None]
    to = row[:, None] * length + col[None, :]
    written = inside & (mine < rows)[:, None]
    if HARD:
        if T:
            first = tl.min(tl.where(tops == top, tl.load(First + of, mask=there, other=0), length), 1)[:, None]
        else:
            first = _first(inside & (y == top), col, length)
        first = tl.where(total == total, first, 0)          # of all NaN the first, as argmax
        hot = tl.where(col[None, :] == first, 1.0, 0.0)
        tl.store(Out + to, hot.to(Out.dtype.element_ty), mask=written)
    else:
        soft = e * tl.div_rn(tl.zeros_like(total) + 1.0, total)
        if Grad is not None:
            at = row[:, None] * grad_step * UNIT + col[None, :]
            grad = tl.load(Grad + at, mask=inside, other=0.0).to(tl.float32)
            if T:
                dots = tl.load(Dot + of, mask=there, other=0.0)
                mean = tl.div_rn(tl.sum(scale * dots, 1)[:, None], total)
            else:
                mean = tl.sum(tl.where(inside, grad * soft, 0.0), 1)[:, None]
            soft = tl.div_rn(soft * (grad - mean), tau)
        tl.store(Out + to, soft.to(Out.dtype.element_ty), mask=written)


def _run(
    logits: Tensor, grad: Tensor | None, keys: tuple[Any, ...], tau: float, hard: bool, out: Tensor
) -> None:
    n = logits.shape[-1]
    rows = logits.numel() // n
    keyed = rows // logits.shape[0] if keyed_by_row(keys) else rows
    unit = VECTOR // logits.element_size() if aligned(logits, n) else 1
    blocks = -(-n // 4)
    c = power_of_two(blocks) if blocks <= _WHOLE_ROW else _LONG
    r = min(max(_BLOCKS // c, 1), 64)
    tiles = -(-blocks // c)
    x, step = rows_of(logits.reshape(rows, n), n)
    on_grad: tuple[Tensor | None, int] = (None, 0)
    if grad is not None:
        g, grad_step = rows_of(grad.reshape(rows, n), n)
        on_grad = g, grad_step // unit
    sizes = rows, n // unit, tiles, keyed, tau, *key_arguments(keys)
    constants = {
        "WHOLE": n % 4 == 0, "UNIT": unit, "R": r, "C": c, "num_warps": min(max(r * c // 64, 1), 16), **OPTIONS,
    }
    grid = (-(-rows // r) * tiles,)
    fresh = lambda dtype=torch.float32: torch.empty(rows, tiles, dtype=dtype, device=logits.device)
    parts: list[Tensor | None] = [None] * 4
    with on(logits):
        if tiles > 1:
            parts = [fresh(), fresh(), None if grad is None else fresh(), fresh(torch.int64) if hard else None]
            soften_tiles[grid](x, step // unit, *on_grad, *parts, *sizes, **constants)
        soften_rows[grid](
            x, step // unit, *on_grad, out, *parts, *sizes, HARD=hard, T=power_of_two(tiles) if tiles > 1 else 0,
            **constants,
        )


def forward(logits: Tensor, *args: Any, out: Tensor | None = None) -> Tensor:
    *keys, tau, hard = args
    direct = out is not None and out.is_contiguous() and out.data_ptr() % VECTOR == 0
    result = out if direct and out is not None else logits.new_empty(logits.shape)
    if result.numel():
        _run(logits, None, tuple(keys), tau, hard, result)
    return result if direct or out is None else out.copy_(result)


def backward(grad: Tensor, logits: Tensor, *args: Any, out: None = None) -> Tensor:
    *keys, tau = args
    result = logits.new_empty(logits.shape)
    if result.numel():
        _run(logits, grad, tuple(keys), tau, False, result)
    return result
