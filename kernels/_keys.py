"""Rows of queries and keys: how many, in which slots of a cache, in how many splits; and rotary embedding."""
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

MAX_SPLITS: tl.constexpr = tl.constexpr(32)
MIN_SPLIT: tl.constexpr = tl.constexpr(256)         # keys
GRAIN: tl.constexpr = tl.constexpr(64)              # a split is a whole number of these


@triton.jit
def queries_of(Cu, b, queries, tokens):
    """(first token, queries) of row b."""
    if Cu is None:
        return (b * queries).to(tl.int64), queries
    else:
        start = tl.minimum(tl.maximum(tl.load(Cu + b), 0), tokens)
        end = tl.minimum(tl.maximum(tl.load(Cu + b + 1), start), tokens)
        return start.to(tl.int64), end - start


@triton.jit
def keys_of(Lengths, Leftpad, b, count, keys, appended, capacity):
    """(first, end) of row b's keys, cut off where the cache ends."""
    end = keys
    if Lengths is not None:
        end = tl.load(Lengths + b).to(tl.int32) + (count if appended < 0 else appended)
    first = 0 if Leftpad is None else tl.maximum(tl.load(Leftpad + b).to(tl.int32), 0)
    end = tl.minimum(end, capacity)
    return tl.minimum(first, end), end


@triton.jit
def split_of(n):
    """Keys in a split of a row of n keys."""
    each = (n + MAX_SPLITS - 1) // MAX_SPLITS
    return tl.maximum((each + GRAIN - 1) // GRAIN * GRAIN, MIN_SPLIT)


@triton.jit
def turned(x, partner, cos, sin, d, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Channel d of a pair rotated: (a c - b s, b c + a s)."""
    first = (d % 2 == 0) if INTERLEAVED else (d < HALF)
    return tl.where(d < 2 * HALF, x * cos + tl.where(first, partner * -1.0, partner) * sin, x)


@triton.jit
def partner_of(d, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """(the other channel of d's pair, the pair)"""
    if INTERLEAVED:
        return d ^ 1, d // 2
    else:
        return tl.where(d < HALF, d + HALF, d - HALF), tl.where(d < HALF, d, d - HALF)


@triton.jit
def slots_of(Table, table_step, BatchIdx, b, at, inside, cache_rows, page, blocks):
    """(row of the cache, place in it) of the keys `at` of row b, and which of them there are."""
    if Table is not None:
        block = at // page
        inside = inside & (block < blocks)
        row = tl.load(Table + b * table_step + block, mask=inside, other=-1).to(tl.int64)
        place = at % page
    else:
        row = (at * 0 + b).to(tl.int64) if BatchIdx is None else (at * 0).to(tl.int64) + tl.load(BatchIdx + b)
        place = at
    return row, place, inside & (row >= 0) & (row < cache_rows)


def unit(x: Tensor) -> Tensor:
    """x, or a copy, with unit stride in its last dim."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def strides(x: Tensor | None, ragged: bool = False) -> tuple[int, int, int]:
    """From row to row, token to token and head to head."""
    if x is None:
        return 0, 0, 0
    return (x.stride(0), x.stride(0), x.stride(1)) if ragged else (x.stride(0), x.stride(1), x.stride(2))


def tight(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()
