"""The gradient of attention in Triton, probabilities recomputed from lse (Dao et al. 2022, appendix B.2): ds = p (dp -
delta) with dp = dout v^T and delta = sum_d dout out - dlse. No score matrix is stored.

Three launches: delta of each query; then tiles of queries (dq) and tiles of keys (dk, dv), each of which walks the
other side in ascending order. That makes scores and dp twice, seven products for five, and takes no atomics: every
gradient is summed in one order, whatever the batch. The query heads of a group lie packed in the rows of tl.dot as in
the forward pass, so one program sums dk and dv of all of them.

lse and out are rounded to float32, which bends every probability of a query, and delta, by more than PyTorch's error.
So float32 sweeps over a query's keys first: for its largest score (shift), 1 / sum e^(score - shift) (share), and delta
= sum p dp.
"""
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._host import OPTIONS, on, power_of_two
from ._keys import queries_of, strides, tight, unit
from ._scores import biased, capped
from .attention import LOG2E, sunk

_RAW = ["tokens", "key_tokens", "queries", "keys"]


@triton.jit
def _start(Cu, b, token, row, step):
    """Elements before row b's first token, whose number is `token` where rows are ragged."""
    return b.to(tl.int64) * row if Cu is None else token * step


@triton.jit
def _tile(X, step, head_step, at, head, there, d, DIM: tl.constexpr):
    """X [at, d] of a head, zero where there is nothing."""
    place = at.to(tl.int64) * step + head * head_step
    return tl.load(X + place[:, None] + d[None, :], mask=there[:, None] & (d < DIM)[None, :], other=0.0)


@triton.jit
def _line(Cu, b, head, token, query, tokens, queries, HEADS: tl.constexpr):
    """Where a query's number lies: [B, H, queries], ragged [H, tokens]."""
    row = b.to(tl.int64) * HEADS + head
    return row * queries + query if Cu is None else head.to(tl.int64) * tokens + token + query


@triton.jit
def _keys_seen(behind, low, high, keys, window_left, window_right, BN: tl.constexpr, CAUSAL: tl.constexpr,
               LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """[start, stop) of the keys that queries low to high may see, from a whole tile on."""
    start, stop = keys * 0, keys
    if CAUSAL:
        stop = tl.minimum(stop, behind + high + 1)
    if RIGHT:
        stop = tl.minimum(stop, behind + high + window_right + 1)
    if LEFT:
        start = tl.maximum(behind + low - window_left, 0) // BN * BN
    return start, stop


@triton.jit
def _scores(
    q, k, Slopes, Mask, b, head, query, at, real, there, behind, queries, scale, softcap, slope_row, mask_row,
    mask_head, mask_query, mask_key, window_left, window_right, CAUSAL: tl.constexpr, LEFT: tl.constexpr,
    RIGHT: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr,
):
    """Scores [queries, keys], -inf where a key is not seen, and how steep the cap is there."""
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    steep = s * 0 + 1.0
    if CAPPED:
        s = capped(s, softcap)
        steep = 1.0 - (s / softcap) * (s / softcap)
    s = biased(
        s, Slopes, Mask, None, b, head, query, at, there[None, :] & real[:, None], behind, queries, slope_row, mask_row,
        mask_head, mask_query, mask_key, window_left, window_right, CAUSAL, LEFT, RIGHT,
    )
    return s, steep


@triton.jit(do_not_specialize=_RAW)
def query_sums(
    Q, K, V, Grad, Out, GradLse, Delta, Shift, Share, CuQ, CuK, Slopes, Sinks, Mask, scale, softcap, q_row, q_step,
    q_head, k_row, k_step, k_head, v_row, v_step, v_head, g_row, g_step, g_head, o_row, o_step, o_head, slope_row,
    mask_row, mask_head, mask_query, mask_key, tokens, key_tokens, queries, keys, window_left, window_right,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    CAPPED: tl.constexpr, PRECISION: tl.constexpr,
):
    """delta of a tile of queries; shift and share too where there is a Share."""
    KV_HEADS: tl.constexpr = HEADS // GROUP
    b, kv_head, tile = tl.program_id(0) // KV_HEADS, tl.program_id(0) % KV_HEADS, tl.program_id(1)
    token, count = queries_of(CuQ, b, queries, tokens)
    if tile * BM >= count * GROUP:
        return
    r = tile * BM + tl.arange(0, BM)
    query, head = r // GROUP, kv_head * GROUP + r % GROUP
    real = query < count
    d, dv = tl.arange(0, BD), tl.arange(0, BDV)
    grad = _tile(Grad + _start(CuQ, b, token, g_row, g_step), g_step, g_head, query, head, real, dv, DV)
    line = _line(CuQ, b, head, token, query, tokens, queries, HEADS)
    if Share is None:
        out = _tile(Out + _start(CuQ, b, token, o_row, o_step), o_step, o_head, query, head, real, dv, DV)
        delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    else:
        key_token, n_keys = queries_of(CuK, b, keys, key_tokens)
        q = _tile(Q + _start(CuQ, b, token, q_row, q_step), q_step, q_head, query, head, real, d, D)
        behind = n_keys - count
        m = tl.full([BM], float("-inf"), tl.float32)
        total, delta = tl.zeros([BM], tl.float32), tl.zeros([BM], tl.float32)
        last = tl.minimum((tile * BM + BM - 1) // GROUP, count - 1)
        start, stop = _keys_seen(behind, tile * BM // GROUP, last, n_keys, window_left, window_right, BN, CAUSAL, LEFT,
                                 RIGHT)
        for n in range(start, stop, BN):
            at = n + tl.arange(0, BN)
            there = at < n_keys
            k = _tile(K + _start(CuK, b, key_token, k_row, k_step), k_step, k_head, at, kv_head, there, d, D)
            v = _tile(V + _start(CuK, b, key_token, v_row, v_step), v_step, v_head, at, kv_head, there, dv, DV)
            s, _ = _scores(
                q, k, Slopes, Mask, b, head, query, at, real, there, behind, queries, scale, softcap, slope_row,
                mask_row, mask_head, mask_query, mask_key, window_left, window_right, CAUSAL, LEFT, RIGHT, CAPPED,
                PRECISION,
            )
            dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
            highest = tl.maximum(m, tl.max(s, 1))
            shift = tl.where(highest == float("-inf"), 0.0, highest)
            p = tl.exp2((s - shift[:, None]) * LOG2E)
            fade = tl.exp2((m - shift) * LOG2E)
            total = total * fade + tl.sum(p, 1)
            delta = delta * fade + tl.sum(tl.where(s == float("-inf"), 0.0, p * dp), 1)
            m = highest
        if Sinks is not None:
            m, total, fade = sunk(m, total, tl.load(Sinks + head).to(tl.float32))
            delta = delta * fade
        share = 1.0 / tl.where(total == 0, 1.0, total)
        delta = delta * share
        tl.store(Shift + line, m, mask=real)
        tl.store(Share + line, share, mask=real)
    if GradLse is not None:
        delta -= tl.load(GradLse + line, mask=real, other=0.0).to(tl.float32)
    tl.store(Delta + line, delta, mask=real)


@triton.jit
def _score_gradients(
    q, k, v, grad, Delta, Shift, Share, line, Slopes, Mask, b, head, query, at, real, there, behind, queries, scale,
    softcap, slope_row, mask_row, mask_head, mask_query, mask_key, window_left, window_right, CAUSAL: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr,
):
    """Probabilities [queries, keys] and the gradients of scores before their scale."""
    s, steep = _scores(
        q, k, Slopes, Mask, b, head, query, at, real, there, behind, queries, scale, softcap, slope_row, mask_row,
        mask_head, mask_query, mask_key, window_left, window_right, CAUSAL, LEFT, RIGHT, CAPPED, PRECISION,
    )
    shift = tl.load(Shift + line, mask=real, other=0.0)
    p = tl.exp2((s - tl.where(shift == float("-inf"), 0.0, shift)[:, None]) * LOG2E)
    if Share is not None:
        p = p * tl.load(Share + line, mask=real, other=0.0)[:, None]
    dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
    ds = p * (dp - tl.load(Delta + line, mask=real, other=0.0)[:, None]) * steep
    return p, tl.where(s == float("-inf"), 0.0, ds)     # a key that is not seen may hold NaN


@triton.jit(do_not_specialize=_RAW)
def key_gradients(
    Q, K, V, Grad, Delta, Shift, Share, GradK, GradV, CuQ, CuK, Slopes, Mask, scale, softcap, q_row, q_step, q_head,
    k_row, k_step, k_head, v_row, v_step, v_head, g_row, g_step, g_head, slope_row, mask_row, mask_head, mask_query,
    mask_key, tokens, key_tokens, queries, keys, window_left, window_right,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    CAPPED: tl.constexpr, PRECISION: tl.constexpr,
):
    """dk and dv of a tile of keys: its row's queries in ascending order."""
    KV_HEADS: tl.constexpr = HEADS // GROUP
    b, kv_head, tile = tl.program_id(0) // KV_HEADS, tl.program_id(0) % KV_HEADS, tl.program_id(1)
    token, count = queries_of(CuQ, b, queries, tokens)
    key_token, n_keys = queries_of(CuK, b, keys, key_tokens)
    if tile * BN >= n_keys:
        return
    at = tile * BN + tl.arange(0, BN)
    there = at < n_keys
    d, dv = tl.arange(0, BD), tl.arange(0, BDV)
    behind = n_keys - count
    k = _tile(K + _start(CuK, b, key_token, k_row, k_step), k_step, k_head, at, kv_head, there, d, D)
    v = _tile(V + _start(CuK, b, key_token, v_row, v_step), v_step, v_head, at, kv_head, there, dv, DV)
    low, high = count * 0, count                        # the queries that may see a key of this tile
    if CAUSAL:
        low = tl.maximum(low, tile * BN - behind)
    if RIGHT:
        low = tl.maximum(low, tile * BN - behind - window_right)
    if LEFT:
        high = tl.minimum(high, tile * BN + BN - behind + window_left)
    dk = tl.zeros([BN, BD], tl.float32)
    dvalue = tl.zeros([BN, BDV], tl.float32)
    for n in range(low * GROUP // BM * BM, high * GROUP, BM):
        r = n + tl.arange(0, BM)
        query, head = r // GROUP, kv_head * GROUP + r % GROUP
        real = query < count
        q = _tile(Q + _start(CuQ, b, token, q_row, q_step), q_step, q_head, query, head, real, d, D)
        grad = _tile(Grad + _start(CuQ, b, token, g_row, g_step), g_step, g_head, query, head, real, dv, DV)
        p, ds = _score_gradients(
            q, k, v, grad, Delta, Shift, Share, _line(CuQ, b, head, token, query, tokens, queries, HEADS), Slopes, Mask,
            b, head, query, at, real, there, behind, queries, scale, softcap, slope_row, mask_row, mask_head,
            mask_query, mask_key, window_left, window_right, CAUSAL, LEFT, RIGHT, CAPPED, PRECISION,
        )
        dvalue += tl.dot(tl.trans(p.to(grad.dtype)), grad, input_precision=PRECISION)
        dk += tl.dot(tl.trans(ds.to(q.dtype)), q, input_precision=PRECISION)
    place = ((key_token + at) * KV_HEADS + kv_head)[:, None]
    dk = (dk * scale).to(GradK.dtype.element_ty)
    tl.store(GradK + place * D + d[None, :], dk, mask=there[:, None] & (d < D)[None, :])
    tl.store(GradV + place * DV + dv[None, :], dvalue.to(GradV.dtype.element_ty),
             mask=there[:, None] & (dv < DV)[None, :])


@triton.jit(do_not_specialize=_RAW)
def query_gradients(
    Q, K, V, Grad, Delta, Shift, Share, GradQ, CuQ, CuK, Slopes, Mask, scale, softcap, q_row, q_step, q_head, k_row,
    k_step, k_head, v_row, v_step, v_head, g_row, g_step, g_head, slope_row, mask_row, mask_head, mask_query, mask_key,
    tokens, key_tokens, queries, keys, window_left, window_right,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    CAPPED: tl.constexpr, PRECISION: tl.constexpr,
):
    """dq of a tile of queries: its row's keys in ascending order."""
    KV_HEADS: tl.constexpr = HEADS // GROUP
    b, kv_head, tile = tl.program_id(0) // KV_HEADS, tl.program_id(0) % KV_HEADS, tl.program_id(1)
    token, count = queries_of(CuQ, b, queries, tokens)
    key_token, n_keys = queries_of(CuK, b, keys, key_tokens)
    if tile * BM >= count * GROUP:
        return
    r = tile * BM + tl.arange(0, BM)
    query, head = r // GROUP, kv_head * GROUP + r % GROUP
    real = query < count
    d, dv = tl.arange(0, BD), tl.arange(0, BDV)
    behind = n_keys - count
    q = _tile(Q + _start(CuQ, b, token, q_row, q_step), q_step, q_head, query, head, real, d, D)
    grad = _tile(Grad + _start(CuQ, b, token, g_row, g_step), g_step, g_head, query, head, real, dv, DV)
    line = _line(CuQ, b, head, token, query, tokens, queries, HEADS)
    last = tl.minimum((tile * BM + BM - 1) // GROUP, count - 1)
    start, stop = _keys_seen(behind, tile * BM // GROUP, last, n_keys, window_left, window_right, BN, CAUSAL, LEFT,
                             RIGHT)
    dq = tl.zeros([BM, BD], tl.float32)
    for n in range(start, stop, BN):
        at = n + tl.arange(0, BN)
        there = at < n_keys
        k = _tile(K + _start(CuK, b, key_token, k_row, k_step), k_step, k_head, at, kv_head, there, d, D)
        v = _tile(V + _start(CuK, b, key_token, v_row, v_step), v_step, v_head, at, kv_head, there, dv, DV)
        _, ds = _score_gradients(
            q, k, v, grad, Delta, Shift, Share, line, Slopes, Mask, b, head, query, at, real, there, behind, queries,
            scale, softcap, slope_row, mask_row, mask_head, mask_query, mask_key, window_left, window_right, CAUSAL,
            LEFT, RIGHT, CAPPED, PRECISION,
        )
        dq += tl.dot(ds.to(k.dtype), k, input_precision=PRECISION)
    place = ((token + query) * HEADS + head)[:, None]
    dq = (dq * scale).to(GradQ.dtype.element_ty)
    tl.store(GradQ + place * D + d[None, :], dq, mask=real[:, None] & (d < D)[None, :])


def _tiles(single: bool, dim: int) -> dict[str, Any]:
    """Query rows and keys of a tile, how products are made, warps and stages: as registers and shared memory allow."""
    if single:
        return {
            "BM": 16, "BN": 32 if dim <= 64 else 16, "PRECISION": "ieee", "num_warps": 8 if dim <= 128 else 4,
            "num_stages": 1,
        }
    return {
        "BM": 32 if dim <= 128 else 16, "BN": 64 if dim <= 64 else 32, "PRECISION": "tf32", "num_warps": 4,
        "num_stages": 2 if dim <= 64 else 1,
    }


def _backward(
    grad: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    cu: tuple[Tensor, Tensor] | tuple[None, None], queries: int, keys: int, causal: bool, left: int, right: int,
    softcap: float, scale: float, slopes: Tensor | None, sinks: Tensor | None, mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    ragged = cu[0] is not None
    grad, q, k, v, out = (unit(x) for x in (grad.to(q.dtype), q, k, v, out))
    grad_lse, lse, slopes = tight(grad_lse), lse.contiguous(), tight(None if slopes is None else slopes.float())
    batch = q.shape[0] if cu[0] is None else cu[0].shape[0] - 1
    heads, dim = q.shape[-2:]
    kv_heads, value_dim = v.shape[-2:]
    group = heads // kv_heads
    # Tokens of no row, past the last one's end, have a gradient of zero.
    dq, dk, dv = ((torch.zeros if ragged else torch.empty)(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    delta = torch.empty_like(lse)
    shift, share = (torch.empty_like(lse), torch.empty_like(lse)) if q.dtype == torch.float32 else (lse, None)
    if mask is not None:
        mask = mask.expand(batch, heads, queries, keys)
        mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    tiles = _tiles(q.dtype == torch.float32, max(dim, value_dim))
    steps = tuple(step for x in (q, k, v, grad) for step in strides(x, ragged))
    scores = (
        slopes.shape[-1] if slopes is not None and slopes.dim() == 2 else 0,
        *(mask.stride() if mask is not None else (0, 0, 0, 0)),
        q.shape[0] if ragged else q.shape[0] * queries, k.shape[0] if ragged else k.shape[0] * keys, queries, keys,
        left, right,
    )
    common = {
        "HEADS": heads, "GROUP": group, "D": dim, "DV": value_dim, "BD": max(16, power_of_two(dim)),
        "BDV": max(16, power_of_two(value_dim)), "CAUSAL": causal, "LEFT": left >= 0, "RIGHT": right >= 0,
        "CAPPED": softcap > 0, **tiles, **OPTIONS,
    }
    scalars = (scale, softcap or 1.0)
    over_queries = (batch * kv_heads, -(-queries * group // tiles["BM"]))
    over_keys = (batch * kv_heads, -(-keys // tiles["BN"]))
    with on(q):
        if all(over_queries):
            query_sums[over_queries](
                q, k, v, grad, out, grad_lse, delta, shift, share, *cu, slopes, sinks, mask, *scalars, *steps,
                *strides(out, ragged), *scores, **common,
            )
            query_gradients[over_queries](
                q, k, v, grad, delta, shift, share, dq, *cu, slopes, mask, *scalars, *steps, *scores, **common,
            )
        if all(over_keys):
            key_gradients[over_keys](
                q, k, v, grad, delta, shift, share, dk, dv, *cu, slopes, mask, *scalars, *steps, *scores, **common,
            )
    if sinks is None:
        return dq, dk, dv, q.new_empty(0)
    weight = torch.exp(sinks.float()[:, None] - shift).nan_to_num(0.0) * (1.0 if share is None else share)
    flow = weight * delta
    return dq, dk, dv, -(flow.sum(1) if ragged else flow.sum((0, 2))).to(sinks.dtype)


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool,
    window_left: int, window_right: int, softcap: float, scale: float, alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None, mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _backward(
        grad_out, grad_lse, q, k, v, out, lse, (None, None), q.shape[1], k.shape[1], causal, window_left, window_right,
        softcap, scale, alibi_slopes, sinks, mask,
    )


def varlen_backward(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int, causal: bool, window_left: int,
    window_right: int, softcap: float, scale: float, alibi_slopes: Tensor | None = None, sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    cu = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
    return _backward(
        grad_out, grad_lse, q, k, v, out, lse, cu, max_seqlen_q, max_seqlen_k, causal, window_left, window_right,
        softcap, scale, alibi_slopes, sinks, None,
    )
