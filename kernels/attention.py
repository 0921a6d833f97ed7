"""Attention in Triton: decoding over a cache, ragged rows and prefill are one kernel.

A program takes a tile of one row's queries, the query heads of a group packed with them into the rows of tl.dot, and
one split of that row's keys. Whether keys are split, the tile and the splits follow from a row's own queries and keys,
so no other row changes a bit: a ragged batch is launched for each of three classes of rows, few queries to many. A
second kernel joins splits in ascending order in float32, with the arithmetic of a row that has one. Bytes: decoding
reads each key and value once. Softmax is online (Milakov and Gimelshein 2018; Dao et al. 2022); the order of scale,
cap, bias and masks is the reference's. Keys that are not valid are never loaded, so what lies in their slots reaches
nothing.

float32 multiplies without tensor cores, but with many queries and head dims up to 64: there it takes three products of
TF32 parts, whose error stayed below 0.45 of the rule's allowance in a model whose sums are truncated (unmeasured on a
GPU). With more channels that spills registers.
"""
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._host import OPTIONS, on, power_of_two
from ._keys import (
    MAX_SPLITS,
    MIN_SPLIT,
    keys_of,
    partner_of,
    queries_of,
    slots_of,
    split_of,
    strides,
    tight,
    turned,
    unit,
)
from ._scores import biased, capped

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
SPLIT_ROWS: tl.constexpr = tl.constexpr(64)         # query rows: with more the keys are not split
# Query rows, over the least up to the most: each class is a launch of its own.
CLASSES = ((0, 16), (16, SPLIT_ROWS.value), (SPLIT_ROWS.value, 2**31 - 1))

_RAW = ["tokens", "queries", "keys", "capacity", "cache_rows", "appended", "splits", "blocks", "positions"]


@triton.jit
def sunk(m, total, sink):
    """(most, sum) with the sink among the keys, and by how much what is summed so far fades."""
    highest = tl.maximum(m, sink)
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    fade = tl.exp2((m - shift) * LOG2E)
    return highest, total * fade + tl.exp2((sink - shift) * LOG2E), fade


@triton.jit
def _ended(m, total):
    """(lse, what the sum of values is divided by): a row without keys gives 0 and -inf, NaN stays."""
    any_seen = total > 0
    lse = tl.where(any_seen, m + tl.log(tl.where(any_seen, total, 1.0)), tl.where(total == total, float("-inf"), total))
    return lse, tl.where(any_seen | (total != total), total, 1.0)


@triton.jit
def _lse_at(Cu, b, head, token, query, tokens, queries, HEADS: tl.constexpr):
    """Where a query's lse lies: [B, H, queries], ragged [H, tokens]."""
    if Cu is None:
        return (b.to(tl.int64) * HEADS + head) * queries + query
    else:
        return head.to(tl.int64) * tokens + token + query


@triton.jit(do_not_specialize=_RAW)
def attend(
    Q, K, V, Out, Lse, Parts, Sums, Lengths, Leftpad, Cu, Table, BatchIdx, Cos, Sin, Slopes, Sinks, Mask, Tree, scale,
    softcap, q_row, q_step, q_head, k_row, k_step, k_head, v_row, v_step, v_head, table_step, slope_row, mask_row,
    mask_head, mask_query, mask_key, tokens, queries, keys, capacity, cache_rows, appended, splits, blocks, positions,
    page, window_left, window_right,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr, CAUSAL: tl.constexpr, LEFT: tl.constexpr,
    RIGHT: tl.constexpr, CAPPED: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, ORDERED: tl.constexpr,
    PRECISION: tl.constexpr, LEAST: tl.constexpr, MOST: tl.constexpr,
):
    KV_HEADS: tl.constexpr = HEADS // GROUP
    b, kv_head = tl.program_id(0) // KV_HEADS, tl.program_id(0) % KV_HEADS
    tile = tl.program_id(1)
    token, count = queries_of(Cu, b, queries, tokens)
    own = count * GROUP
    if (tile * BM >= own) | (own <= LEAST) | (own > MOST):      # rows of another class are another launch's
        return
    first, end = keys_of(Lengths, Leftpad, b, count, keys, appended, capacity)
    low, high = first, end
    if SPLIT:
        each = split_of(end - first)
        low = first + tl.program_id(2) * each
        if (low >= end) & (tl.program_id(2) > 0):
            return
        high = tl.minimum(low + each, end)

    r = tile * BM + tl.arange(0, BM)
    query, head = r // GROUP, kv_head * GROUP + r % GROUP
    real = query < count
    d, dv = tl.arange(0, BD), tl.arange(0, BDV)
    behind = end - count                                # a query's place among the keys is behind + query
    from_q = Q + (token * q_row if Cu is not None else b.to(tl.int64) * q_row)
    from_q = (from_q + query.to(tl.int64) * q_step + head * q_head)[:, None]
    q = tl.load(from_q + d[None, :], mask=real[:, None] & (d < D)[None, :], other=0.0)
    if HALF > 0:
        length = tl.load(Lengths + b).to(tl.int32)
        position = tl.minimum(tl.maximum(length + (query if ORDERED else query * 0), 0), positions - 1)
        other, pair = partner_of(d, HALF, INTERLEAVED)
        turning = real[:, None] & (d < 2 * HALF)[None, :]
        partner = tl.load(from_q + other[None, :], mask=turning, other=0.0).to(tl.float32)
        angle = position[:, None] * HALF + pair[None, :]
        cos = tl.load(Cos + angle, mask=turning, other=0.0).to(tl.float32)
        sin = tl.load(Sin + angle, mask=turning, other=0.0).to(tl.float32)
        q = turned(q.to(tl.float32), partner, cos, sin, d[None, :], HALF, INTERLEAVED).to(q.dtype)

    nearest, furthest = behind + tile * BM // GROUP, behind + tl.minimum((tile * BM + BM - 1) // GROUP, count - 1)
    start, stop = low, high
    if CAUSAL:
        stop = tl.minimum(stop, furthest + 1)
    if RIGHT:
        stop = tl.minimum(stop, furthest + window_right + 1)
    if LEFT:                                            # whole blocks are skipped, so a block is the same for all
        start = low + tl.maximum(nearest - window_left - low, 0) // BN * BN

    m = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BDV], tl.float32)
    for n in range(start, stop, BN):
        at = n + tl.arange(0, BN)
        row, place, there = slots_of(Table, table_step, BatchIdx, b, at, at < high, cache_rows, page, blocks)
        from_k = K + row * k_row + place.to(tl.int64) * k_step + kv_head * k_head
        k = tl.load(from_k[None, :] + d[:, None], mask=there[None, :] & (d < D)[:, None], other=0.0)
        s = tl.dot(q, k.to(q.dtype), input_precision=PRECISION) * scale
        if CAPPED:
            s = capped(s, softcap)
        s = biased(
            s, Slopes, Mask, Tree, b, head, query, at, there[None, :] & real[:, None], behind, queries, slope_row,
            mask_row, mask_head, mask_query, mask_key, window_left, window_right, CAUSAL, LEFT, RIGHT,
        )
        highest = tl.maximum(m, tl.max(s, 1))
        shift = tl.where(highest == float("-inf"), 0.0, highest)
        p = tl.exp2((s - shift[:, None]) * LOG2E)
        fade = tl.exp2((m - shift) * LOG2E)
        total = total * fade + tl.sum(p, 1)
        from_v = V + row * v_row + place.to(tl.int64) * v_step + kv_head * v_head
        v = tl.load(from_v[:, None] + dv[None, :], mask=there[:, None] & (dv < DV)[None, :], other=0.0)
        acc = acc * fade[:, None] + tl.dot(p.to(q.dtype), v.to(q.dtype), input_precision=PRECISION)
        m = highest

    written = real[:, None] & (dv < DV)[None, :]
    if SPLIT:
        part = (tl.program_id(2).to(tl.int64) * tokens + token + query) * HEADS + head
        tl.store(Parts + part[:, None] * DV + dv[None, :], acc, mask=written)
        tl.store(Sums + 2 * part, m, mask=real)
        tl.store(Sums + 2 * part + 1, total, mask=real)
    else:
        if Sinks is not None:
            m, total, fade = sunk(m, total, tl.load(Sinks + head).to(tl.float32))
            acc = acc * fade[:, None]
        lse, divisor = _ended(m, total)
        out = acc / divisor[:, None]
        at_out = (token + query) * HEADS + head
        tl.store(Out + at_out[:, None] * DV + dv[None, :], out.to(Out.dtype.element_ty), mask=written)
        tl.store(Lse + _lse_at(Cu, b, head, token, query, tokens, queries, HEADS), lse, mask=real)


@triton.jit(do_not_specialize=_RAW)
def combine(
    Parts, Sums, Out, Lse, Lengths, Leftpad, Cu, Sinks, tokens, queries, keys, capacity, appended, splits,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DV: tl.constexpr, BDV: tl.constexpr,
):
    """One query's splits in ascending order, then its sink."""
    b, query, head = tl.program_id(0) // queries, tl.program_id(0) % queries, tl.program_id(1)
    token, count = queries_of(Cu, b, queries, tokens)
    if (query >= count) | (count * GROUP > SPLIT_ROWS):
        return
    first, end = keys_of(Lengths, Leftpad, b, count, keys, appended, capacity)
    used = tl.maximum((end - first + split_of(end - first) - 1) // split_of(end - first), 1)
    dv = tl.arange(0, BDV)
    m = tl.full([], float("-inf"), tl.float32)
    total = tl.full([], 0.0, tl.float32)
    acc = tl.zeros([BDV], tl.float32)
    for s in range(0, tl.minimum(used, splits)):
        part = (s * tokens.to(tl.int64) + token + query) * HEADS + head
        most = tl.load(Sums + 2 * part)
        x = tl.load(Parts + part * DV + dv, mask=(dv < DV) & (most != float("-inf")), other=0.0)
        highest = tl.maximum(m, most)
        shift = tl.where(highest == float("-inf"), 0.0, highest)
        fade, weight = tl.exp2((m - shift) * LOG2E), tl.exp2((most - shift) * LOG2E)
        total = total * fade + weight * tl.load(Sums + 2 * part + 1)
        acc = acc * fade + weight * x
        m = highest
    if Sinks is not None:
        m, total, fade = sunk(m, total, tl.load(Sinks + head).to(tl.float32))
        acc = acc * fade
    lse, divisor = _ended(m, total)
    out = acc / divisor
    tl.store(Out + ((token + query) * HEADS + head) * DV + dv, out.to(Out.dtype.element_ty), mask=dv < DV)
    tl.store(Lse + _lse_at(Cu, b, head, token, query, tokens, queries, HEADS), lse)


def _tile(single: bool, dim: int, most: int) -> dict[str, Any]:
    """Query rows and keys of a block, how products are made, warps and stages, of a class of rows with no more than
    `most`: as registers and shared memory allow everywhere."""
    cores = triton.knobs.runtime.interpret or triton.runtime.driver.active.get_current_target().backend == "cuda"
    many = most > SPLIT_ROWS.value
    thrice = single and many and cores and dim <= 64
    return {
        "BM": 64 if many and (thrice or not single) else 16 if single else min(most, 32),
        "BN": 32 if single or dim > 128 else 64,
        "PRECISION": "tf32x3" if thrice else "ieee" if single else "tf32",
        "num_warps": 8 if dim > 128 or thrice else 4,
        "num_stages": 1 if single and not thrice else 2,
    }


def _attend(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, appended: int, table: Tensor | None,
    batch_idx: Tensor | None, leftpad: Tensor | None, cu: Tensor | None, longest: int, cos: Tensor | None,
    sin: Tensor | None, interleaved: bool, causal: bool, left: int, right: int, softcap: float, scale: float,
    slopes: Tensor | None, sinks: Tensor | None, mask: Tensor | None, tree: Tensor | None,
    out: tuple[Tensor | None, ...] | None, most_keys: int | None = None,
) -> tuple[Tensor, Tensor]:
    q = unit(q)
    batch = q.shape[0] if cu is None else cu.shape[0] - 1
    heads, dim = q.shape[-2:]
    kv_heads, value_dim = v.shape[-2:]
    tokens = q.shape[0] * q.shape[1] if cu is None else q.shape[0]
    page = k.shape[1]
    blocks = 0 if table is None else table.shape[1]
    capacity = page * blocks if table is not None else page
    empty = lambda *shape, dtype=torch.float32: torch.empty(shape, dtype=dtype, device=q.device)
    given = (None, None) if out is None else out
    usable = lambda x: x is not None and x.is_contiguous()
    result = given[0] if usable(given[0]) else empty(*q.shape[:-1], value_dim, dtype=q.dtype)
    lse = given[1] if usable(given[1]) else empty(*((batch, heads, longest) if cu is None else (heads, tokens)))
    assert result is not None and lse is not None
    if batch and tokens and longest:
        group = heads // kv_heads
        ordered = causal or left >= 0 or right >= 0 or tree is not None
        if mask is not None:
            mask = mask.expand(batch, heads, longest, k.shape[1])
            mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
        slopes = None if slopes is None else slopes.float().contiguous()
        bound = capacity if most_keys is None else min(capacity, most_keys)
        splits = min(MAX_SPLITS.value, max(1, -(-bound // MIN_SPLIT.value)))
        split = splits > 1 and (cu is not None or longest * group <= SPLIT_ROWS.value)
        parts = empty(splits, tokens, heads, value_dim) if split else None
        sums = empty(splits, tokens, heads, 2) if split else None
        common = {"HEADS": heads, "GROUP": group, "DV": value_dim, "BDV": max(16, power_of_two(value_dim)), **OPTIONS}
        where = (lengths, leftpad, cu)
        with on(q):
            for least, most in CLASSES:
                if longest * group <= least or (cu is None and longest * group > most):
                    continue
                rows, apart = min(longest * group, most), split and most <= SPLIT_ROWS.value
                tile = _tile(q.dtype == torch.float32, max(dim, value_dim), most)
                attend[(batch * kv_heads, -(-rows // tile["BM"]), splits if apart else 1)](
                    q, k, v, result, lse, parts, sums, *where, table, batch_idx, cos, sin, slopes, sinks, mask,
                    None if tree is None else tree.contiguous().view(torch.uint8), scale, softcap or 1.0,
                    *strides(q, cu is not None), *strides(k), *strides(v), 0 if table is None else table.stride(0),
                    slopes.shape[-1] if slopes is not None and slopes.dim() == 2 else 0,
                    *(mask.stride() if mask is not None else (0, 0, 0, 0)),
                    tokens, longest, k.shape[1], capacity, k.shape[0], appended, splits, blocks,
                    0 if cos is None else cos.shape[0], page, left, right,
                    D=dim, BD=max(16, power_of_two(dim)), SPLIT=apart, CAUSAL=causal, LEFT=left >= 0,
                    RIGHT=right >= 0, CAPPED=softcap > 0, HALF=0 if cos is None else cos.shape[1],
                    INTERLEAVED=interleaved, ORDERED=ordered, LEAST=least, MOST=most, **tile, **common,
                )
            if split:
                combine[(batch * longest, heads)](
                    parts, sums, result, lse, *where, sinks, tokens, longest, k.shape[1], capacity, appended, splits,
                    num_warps=1, **common,
                )
    finish = lambda made, x: made if x is None or x is made else x.copy_(made)
    return finish(result, given[0]), finish(lse, given[1])


def forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, window_left: int, window_right: int, softcap: float, scale: float,
    alibi_slopes: Tensor | None = None, sinks: Tensor | None = None, mask: Tensor | None = None,
    out: tuple[Tensor | None, ...] | None = None,
) -> tuple[Tensor, Tensor]:
    return _attend(
        q, unit(k), unit(v), None, 0, None, None, None, None, q.shape[1], None, None, True, causal, window_left,
        window_right, softcap, scale, alibi_slopes, sinks, mask, None, out,
    )


def kvcache_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor, appended: int, block_table: Tensor | None,
    cache_batch_idx: Tensor | None, cache_leftpad: Tensor | None, cu_seqlens_q: Tensor | None, max_seqlen_q: int,
    rotary_cos: Tensor | None, rotary_sin: Tensor | None, rotary_interleaved: bool, causal: bool, window_left: int,
    window_right: int, softcap: float, scale: float, alibi_slopes: Tensor | None = None, sinks: Tensor | None = None,
    tree_mask: Tensor | None = None, k_scale: None = None, v_scale: None = None,
    out: tuple[Tensor | None, ...] | None = None,
) -> tuple[Tensor, Tensor]:
    return _attend(
        q, k_cache, v_cache, cache_seqlens.contiguous(), appended, block_table, tight(cache_batch_idx),
        tight(cache_leftpad), tight(cu_seqlens_q), max_seqlen_q, tight(rotary_cos), tight(rotary_sin),
        rotary_interleaved, causal, window_left, window_right, softcap, scale, alibi_slopes, sinks, None, tree_mask,
        out,
    )


def varlen_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    block_table: Tensor | None, causal: bool, window_left: int, window_right: int, softcap: float, scale: float,
    alibi_slopes: Tensor | None = None, sinks: Tensor | None = None, out: tuple[Tensor | None, ...] | None = None,
) -> tuple[Tensor, Tensor]:
    """Rows packed end to end share one cache: row b's keys are its slots from cu_seqlens_k[b] on."""
    cu_k, leftpad = cu_seqlens_k.contiguous(), None
    if block_table is None:
        batch = cu_k.shape[0] - 1
        k, v = (unit(x).expand(batch, *x.shape) for x in (k, v))
        lengths, leftpad = cu_k[1:], cu_k[:-1]
    else:
        lengths = cu_k.diff()
    return _attend(
        q, k, v, lengths, 0, tight(block_table), None, leftpad, tight(cu_seqlens_q), max_seqlen_q, None, None, True,
        causal, window_left, window_right, softcap, scale, alibi_slopes, sinks, None, None, out, max_seqlen_k,
    )
