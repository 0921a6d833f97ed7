"""Attention in Triton: decoding over a cache and prefill are one kernel; appending to a cache is another.

A program takes a tile of one row's queries, the query heads of a group packed with them into the rows of tl.dot, and
one split of that row's keys. Splits count from the row's first key and their length is a function of its key count
alone; a second kernel combines them in ascending order in float32. Bytes: decoding reads each key and value once.
Softmax is online (Milakov and Gimelshein 2018; Dao et al. 2022); the order of scale, cap, bias and masks is the
reference's. Keys that are not valid are never loaded, so what lies in their slots reaches nothing.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._host import OPTIONS, on, power_of_two
from ._math import expm1

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
MAX_SPLITS: tl.constexpr = tl.constexpr(32)
MIN_SPLIT: tl.constexpr = tl.constexpr(256)         # keys
GRAIN: tl.constexpr = tl.constexpr(64)              # a split is a whole number of these

_RAW = ["tokens", "queries", "keys", "capacity", "cache_rows", "appended", "splits", "blocks", "positions"]


@triton.jit
def _count(Cu, b, queries, tokens):
    """(first token, queries) of row b."""
    if Cu is None:
        return (b * queries).to(tl.int64), queries
    else:
        start = tl.minimum(tl.maximum(tl.load(Cu + b), 0), tokens)
        end = tl.minimum(tl.maximum(tl.load(Cu + b + 1), start), tokens)
        return start.to(tl.int64), end - start


@triton.jit
def _keys(Lengths, Leftpad, b, count, keys, appended, capacity):
    """(first, end) of row b's keys, cut off where the cache ends."""
    end = keys
    if Lengths is not None:
        end = tl.load(Lengths + b).to(tl.int32) + (count if appended < 0 else appended)
    first = 0 if Leftpad is None else tl.maximum(tl.load(Leftpad + b).to(tl.int32), 0)
    end = tl.minimum(end, capacity)
    return tl.minimum(first, end), end


@triton.jit
def _split(n):
    """Keys in a split of a row of n keys."""
    each = (n + MAX_SPLITS - 1) // MAX_SPLITS
    return tl.maximum((each + GRAIN - 1) // GRAIN * GRAIN, MIN_SPLIT)


@triton.jit
def _turned(x, partner, cos, sin, d, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Channel d of a pair rotated: (a c - b s, b c + a s)."""
    first = (d % 2 == 0) if INTERLEAVED else (d < HALF)
    return tl.where(d < 2 * HALF, x * cos + tl.where(first, partner * -1.0, partner) * sin, x)


@triton.jit
def _partner(d, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """(the other channel of d's pair, the pair)"""
    if INTERLEAVED:
        return d ^ 1, d // 2
    else:
        return tl.where(d < HALF, d + HALF, d - HALF), tl.where(d < HALF, d, d - HALF)


@triton.jit
def _rows_of_keys(Table, table_step, BatchIdx, b, at, inside, cache_rows, page, blocks):
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


@triton.jit(do_not_specialize=_RAW)
def attend(
    Q, K, V, Out, Lse, Lengths, Leftpad, Cu, Table, BatchIdx, Cos, Sin, Slopes, Sinks, Mask, Tree, scale, softcap,
    q_row, q_step, q_head, k_row, k_step, k_head, v_row, v_step, v_head, table_step, slope_row, mask_row, mask_head,
    mask_query, mask_key, tokens, queries, keys, capacity, cache_rows, appended, splits, blocks, positions, page,
    window_left, window_right,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr, CAUSAL: tl.constexpr, LEFT: tl.constexpr,
    RIGHT: tl.constexpr, CAPPED: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, ORDERED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    KV_HEADS: tl.constexpr = HEADS // GROUP
    b, kv_head = tl.program_id(0) // KV_HEADS, tl.program_id(0) % KV_HEADS
    tile = tl.program_id(1)
    token, count = _count(Cu, b, queries, tokens)
    if tile * BM >= count * GROUP:
        return
    first, end = _keys(Lengths, Leftpad, b, count, keys, appended, capacity)
    low, high = first, end
    if SPLIT:
        each = _split(end - first)
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
        other, pair = _partner(d, HALF, INTERLEAVED)
        turning = real[:, None] & (d < 2 * HALF)[None, :]
        partner = tl.load(from_q + other[None, :], mask=turning, other=0.0).to(tl.float32)
        angle = position[:, None] * HALF + pair[None, :]
        cos = tl.load(Cos + angle, mask=turning, other=0.0).to(tl.float32)
        sin = tl.load(Sin + angle, mask=turning, other=0.0).to(tl.float32)
        q = _turned(q.to(tl.float32), partner, cos, sin, d[None, :], HALF, INTERLEAVED).to(q.dtype)

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
        row, place, there = _rows_of_keys(Table, table_step, BatchIdx, b, at, at < high, cache_rows, page, blocks)
        from_k = K + row * k_row + place.to(tl.int64) * k_step + kv_head * k_head
        k = tl.load(from_k[None, :] + d[:, None], mask=there[None, :] & (d < D)[:, None], other=0.0)
        s = tl.dot(q, k.to(q.dtype), input_precision=PRECISION) * scale
        if CAPPED:
            e = expm1(tl.minimum(tl.abs(s) * (2.0 / softcap), 60.0))
            bent = softcap * (e / (e + 2.0))
            s = tl.where(s < 0, bent * -1.0, tl.where(s == s, bent, s))
        distance = (behind + query)[:, None] - at[None, :]
        if Slopes is not None:
            slope = tl.load(Slopes + b * slope_row + head)
            s -= slope[:, None] * tl.abs(distance).to(tl.float32)
        allowed = there[None, :] & real[:, None]
        if CAUSAL:
            allowed = allowed & (distance >= 0)
        if LEFT:
            allowed = allowed & (distance <= window_left)
        if RIGHT:
            allowed = allowed & (distance >= 0 - window_right)
        if Mask is not None:
            from_mask = b.to(tl.int64) * mask_row + head.to(tl.int64) * mask_head + query.to(tl.int64) * mask_query
            given = tl.load(Mask + from_mask[:, None] + at[None, :] * mask_key, mask=allowed, other=0)
            if Mask.dtype.element_ty == tl.uint8:
                allowed = allowed & (given != 0)
            else:
                s += given.to(tl.float32)
        if Tree is not None:
            column = at - behind
            from_tree = (b.to(tl.int64) * queries + query) * queries
            asks = allowed & (column >= 0)[None, :]
            seen = tl.load(Tree + from_tree[:, None] + column[None, :], mask=asks, other=1)
            allowed = allowed & (seen != 0)
        s = tl.where(allowed, s, float("-inf"))
        highest = tl.maximum(m, tl.max(s, 1))
        shift = tl.where(highest == float("-inf"), 0.0, highest)
        p = tl.exp2((s - shift[:, None]) * LOG2E)
        fade = tl.exp2((m - shift) * LOG2E)
        total = total * fade + tl.sum(p, 1)
        from_v = V + row * v_row + place.to(tl.int64) * v_step + kv_head * v_head
        v = tl.load(from_v[:, None] + dv[None, :], mask=there[:, None] & (dv < DV)[None, :], other=0.0)
        acc = acc * fade[:, None] + tl.dot(p.to(q.dtype), v.to(q.dtype), input_precision=PRECISION)
        m = highest

    if Sinks is not None and not SPLIT:
        sink = tl.load(Sinks + head).to(tl.float32)
        highest = tl.maximum(m, sink)
        shift = tl.where(highest == float("-inf"), 0.0, highest)
        fade = tl.exp2((m - shift) * LOG2E)
        total = total * fade + tl.exp2((sink - shift) * LOG2E)
        acc = acc * fade[:, None]
        m = highest
    seen_any = total > 0
    lse = tl.where(seen_any, m + tl.log(tl.where(seen_any, total, 1.0)), tl.where(total == total, float("-inf"), total))
    out = acc / tl.where(seen_any | (total != total), total, 1.0)[:, None]
    written = real[:, None] & (dv < DV)[None, :]
    if SPLIT:
        part = (tl.program_id(2).to(tl.int64) * tokens + token + query) * HEADS + head
        tl.store(Out + part[:, None] * DV + dv[None, :], out, mask=written)
        tl.store(Lse + part, lse, mask=real)
    else:
        at_out = (token + query) * HEADS + head
        tl.store(Out + at_out[:, None] * DV + dv[None, :], out.to(Out.dtype.element_ty), mask=written)
        if Cu is None:
            tl.store(Lse + (b.to(tl.int64) * HEADS + head) * queries + query, lse, mask=real)
        else:
            tl.store(Lse + head.to(tl.int64) * tokens + token + query, lse, mask=real)


@triton.jit(do_not_specialize=_RAW)
def combine(
    Parts, PartLse, Out, Lse, Lengths, Leftpad, Cu, Sinks, tokens, queries, keys, capacity, appended,
    HEADS: tl.constexpr, DV: tl.constexpr, BDV: tl.constexpr,
):
    """One query's splits in ascending order, then its sink."""
    b, query, head = tl.program_id(0) // queries, tl.program_id(0) % queries, tl.program_id(1)
    token, count = _count(Cu, b, queries, tokens)
    if query >= count:
        return
    first, end = _keys(Lengths, Leftpad, b, count, keys, appended, capacity)
    splits = tl.maximum((end - first + _split(end - first) - 1) // _split(end - first), 1)
    dv = tl.arange(0, BDV)
    m = tl.full([], float("-inf"), tl.float32)
    total = tl.full([], 0.0, tl.float32)
    acc = tl.zeros([BDV], tl.float32)
    for s in range(0, splits):
        part = (s * tokens.to(tl.int64) + token + query) * HEADS + head
        lse = tl.load(PartLse + part)
        x = tl.load(Parts + part * DV + dv, mask=(dv < DV) & (lse != float("-inf")), other=0.0)
        highest = tl.maximum(m, lse)
        shift = tl.where(highest == float("-inf"), 0.0, highest)
        fade, weight = tl.exp2((m - shift) * LOG2E), tl.exp2((lse - shift) * LOG2E)
        total = total * fade + weight
        acc = acc * fade + weight * x
        m = highest
    if Sinks is not None:
        sink = tl.load(Sinks + head).to(tl.float32)
        highest = tl.maximum(m, sink)
        shift = tl.where(highest == float("-inf"), 0.0, highest)
        fade = tl.exp2((m - shift) * LOG2E)
        total = total * fade + tl.exp2((sink - shift) * LOG2E)
        acc = acc * fade
        m = highest
    seen_any = total > 0
    lse = tl.where(seen_any, m + tl.log(tl.where(seen_any, total, 1.0)), tl.where(total == total, float("-inf"), total))
    out = acc / tl.where(seen_any | (total != total), total, 1.0)
    tl.store(Out + ((token + query) * HEADS + head) * DV + dv, out.to(Out.dtype.element_ty), mask=dv < DV)
    if Cu is None:
        tl.store(Lse + (b.to(tl.int64) * HEADS + head) * queries + query, lse)
    else:
        tl.store(Lse + head.to(tl.int64) * tokens + token + query, lse)


@triton.jit(do_not_specialize=["tokens", "queries", "cache_rows", "blocks", "positions"])
def append(
    KCache, VCache, K, V, Lengths, Cu, Table, BatchIdx, Cos, Sin, kc_row, kc_step, kc_head, vc_row, vc_step, vc_head,
    k_row, k_step, k_head, v_row, v_step, v_head, table_step, tokens, queries, cache_rows, page, blocks, positions,
    KV_HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
):
    """The keys and values of one head of one row, from its step on."""
    b, step, head = tl.program_id(0) // queries, tl.program_id(0) % queries, tl.program_id(1)
    token, count = _count(Cu, b, queries, tokens)
    length = tl.load(Lengths + b).to(tl.int32)
    d, dv = tl.arange(0, BD), tl.arange(0, BDV)
    while step < count:
        at = length + step
        row, place, there = _rows_of_keys(Table, table_step, BatchIdx, b, at, at >= 0, cache_rows, page, blocks)
        there = there & (place < page)
        from_k = K + (token + step) * k_step if Cu is not None else K + b.to(tl.int64) * k_row + step * k_step
        from_v = V + (token + step) * v_step if Cu is not None else V + b.to(tl.int64) * v_row + step * v_step
        from_k, from_v = from_k + head * k_head, from_v + head * v_head
        k = tl.load(from_k + d, mask=(d < D) & there, other=0.0)
        if HALF > 0:
            position = tl.minimum(tl.maximum(at, 0), positions - 1)
            other, pair = _partner(d, HALF, INTERLEAVED)
            turning = (d < 2 * HALF) & there
            partner = tl.load(from_k + other, mask=turning, other=0.0).to(tl.float32)
            cos = tl.load(Cos + position * HALF + pair, mask=turning, other=0.0).to(tl.float32)
            sin = tl.load(Sin + position * HALF + pair, mask=turning, other=0.0).to(tl.float32)
            k = _turned(k.to(tl.float32), partner, cos, sin, d, HALF, INTERLEAVED).to(k.dtype)
        v = tl.load(from_v + dv, mask=(dv < DV) & there, other=0.0)
        to_k = KCache + row * kc_row + place.to(tl.int64) * kc_step + head * kc_head
        to_v = VCache + row * vc_row + place.to(tl.int64) * vc_step + head * vc_head
        tl.store(to_k + d, k.to(KCache.dtype.element_ty), mask=(d < D) & there)
        tl.store(to_v + dv, v.to(VCache.dtype.element_ty), mask=(dv < DV) & there)
        step += queries


def _unit(x: Tensor) -> Tensor:
    """x, or a copy, with unit stride in its last dim."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _strides(x: Tensor | None, ragged: bool = False) -> tuple[int, int, int]:
    """From row to row, token to token and head to head."""
    if x is None:
        return 0, 0, 0
    return (x.stride(0), x.stride(0), x.stride(1)) if ragged else (x.stride(0), x.stride(1), x.stride(2))


def _attend(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, appended: int, table: Tensor | None,
    batch_idx: Tensor | None, leftpad: Tensor | None, cu: Tensor | None, longest: int, cos: Tensor | None,
    sin: Tensor | None, interleaved: bool, causal: bool, left: int, right: int, softcap: float, scale: float,
    slopes: Tensor | None, sinks: Tensor | None, mask: Tensor | None, tree: Tensor | None,
    out: tuple[Tensor | None, ...] | None,
) -> tuple[Tensor, Tensor]:
    q = _unit(q)
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
        rows = longest * (heads // kv_heads)
        single, wide = q.dtype == torch.float32, max(dim, value_dim) > 128
        bm = min(16 if single else 64, max(16, power_of_two(rows)))     # float32 has no matrix units: small tiles
        bn = 32 if single or wide else 64
        splits = min(MAX_SPLITS.value, max(1, -(-capacity // MIN_SPLIT.value))) if rows <= 64 else 1
        split, parts, part_lse = splits > 1, result, lse
        if split:
            parts, part_lse = empty(splits, tokens, heads, value_dim), empty(splits, tokens, heads)
        ordered = causal or left >= 0 or right >= 0 or tree is not None
        if mask is not None:
            mask = mask.expand(batch, heads, longest, k.shape[1])
            mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
        slopes = None if slopes is None else slopes.float().contiguous()
        common = {"HEADS": heads, "DV": value_dim, "BDV": max(16, power_of_two(value_dim)), **OPTIONS}
        where = (lengths, leftpad, cu)
        with on(q):
            attend[(batch * kv_heads, -(-rows // bm), splits)](
                q, k, v, parts, part_lse, *where, table, batch_idx, cos, sin, slopes, sinks, mask,
                None if tree is None else tree.contiguous().view(torch.uint8), scale, softcap or 1.0,
                *_strides(q, cu is not None), *_strides(k), *_strides(v), 0 if table is None else table.stride(0),
                slopes.shape[-1] if slopes is not None and slopes.dim() == 2 else 0,
                *(mask.stride() if mask is not None else (0, 0, 0, 0)),
                tokens, longest, k.shape[1], capacity, k.shape[0], appended, splits, blocks,
                0 if cos is None else cos.shape[0], page, left, right,
                GROUP=heads // kv_heads, D=dim, BD=max(16, power_of_two(dim)), BM=bm, BN=bn, SPLIT=split,
                CAUSAL=causal, LEFT=left >= 0, RIGHT=right >= 0, CAPPED=softcap > 0,
                HALF=0 if cos is None else cos.shape[1], INTERLEAVED=interleaved, ORDERED=ordered,
                PRECISION="ieee" if single else "tf32", num_warps=8 if wide else 4, num_stages=1 if single else 2,
                **common,
            )
            if split:
                combine[(batch * longest, heads)](
                    parts, part_lse, result, lse, *where, sinks, tokens, longest, k.shape[1], capacity, appended,
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
        q, _unit(k), _unit(v), None, 0, None, None, None, None, q.shape[1], None, None, True, causal, window_left,
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
    tight = lambda x: None if x is None else x.contiguous()
    return _attend(
        q, k_cache, v_cache, cache_seqlens.contiguous(), appended, block_table, tight(cache_batch_idx),
        tight(cache_leftpad), tight(cu_seqlens_q), max_seqlen_q, tight(rotary_cos), tight(rotary_sin),
        rotary_interleaved, causal, window_left, window_right, softcap, scale, alibi_slopes, sinks, None, tree_mask,
        out,
    )


def kvcache_append(
    k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, cache_seqlens: Tensor, block_table: Tensor | None = None,
    cache_batch_idx: Tensor | None = None, cache_leftpad: Tensor | None = None, cu_seqlens: Tensor | None = None,
    max_seqlen_q: int = 0, rotary_cos: Tensor | None = None, rotary_sin: Tensor | None = None,
    rotary_interleaved: bool = True, k_head_scale: None = None, v_head_scale: None = None, k_token_scale: None = None,
    v_token_scale: None = None, out: None = None,
) -> None:
    k, v = _unit(k), _unit(v)
    ragged = cu_seqlens is not None
    batch = cache_seqlens.shape[0]
    steps = max(max_seqlen_q, 1) if ragged else k.shape[1]
    tokens = k.shape[0] if ragged else k.shape[0] * k.shape[1]
    if batch and tokens and k_cache.numel() + v_cache.numel():
        tight = lambda x: None if x is None else x.contiguous()
        kv_heads, dim, value_dim = k.shape[-2], k.shape[-1], v.shape[-1]
        cos = tight(rotary_cos)
        with on(k):
            append[(batch * steps, kv_heads)](
                k_cache, v_cache, k, v, cache_seqlens.contiguous(), tight(cu_seqlens), block_table,
                tight(cache_batch_idx), cos, tight(rotary_sin), *_strides(k_cache), *_strides(v_cache),
                *_strides(k, ragged), *_strides(v, ragged), 0 if block_table is None else block_table.stride(0),
                tokens, steps, k_cache.shape[0], k_cache.shape[1], 0 if block_table is None else block_table.shape[1],
                0 if cos is None else cos.shape[0],
                KV_HEADS=kv_heads, D=dim, DV=value_dim, BD=power_of_two(dim), BDV=power_of_two(value_dim),
                HALF=0 if cos is None else cos.shape[1], INTERLEAVED=rotary_interleaved, num_warps=1, **OPTIONS,
            )
    torch.autograd.graph.increment_version(k_cache)
    torch.autograd.graph.increment_version(v_cache)
