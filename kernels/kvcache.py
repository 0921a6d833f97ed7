"""New keys and values into a cache, in Triton: turned where asked, in the slots behind a row's length."""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._host import OPTIONS, on, power_of_two
from ._keys import partner_of, queries_of, slots_of, strides, tight, turned, unit


@triton.jit(do_not_specialize=["tokens", "queries", "cache_rows", "blocks", "positions"])
def append(
    KCache, VCache, K, V, Lengths, Cu, Table, BatchIdx, Cos, Sin, kc_row, kc_step, kc_head, vc_row, vc_step, vc_head,
    k_row, k_step, k_head, v_row, v_step, v_head, table_step, tokens, queries, cache_rows, page, blocks, positions,
    KV_HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
):
    """The keys and values of one head of one row, from its step on."""
    b, step, head = tl.program_id(0) // queries, tl.program_id(0) % queries, tl.program_id(1)
    token, count = queries_of(Cu, b, queries, tokens)
    length = tl.load(Lengths + b).to(tl.int32)
    d, dv = tl.arange(0, BD), tl.arange(0, BDV)
    while step < count:
        at = length + step
        row, place, there = slots_of(Table, table_step, BatchIdx, b, at, at >= 0, cache_rows, page, blocks)
        there = there & (place < page)
        from_k = K + (token + step) * k_step if Cu is not None else K + b.to(tl.int64) * k_row + step * k_step
        from_v = V + (token + step) * v_step if Cu is not None else V + b.to(tl.int64) * v_row + step * v_step
        from_k, from_v = from_k + head * k_head, from_v + head * v_head
        k = tl.load(from_k + d, mask=(d < D) & there, other=0.0)
        if HALF > 0:
            position = tl.minimum(tl.maximum(at, 0), positions - 1)
            other, pair = partner_of(d, HALF, INTERLEAVED)
            turning = (d < 2 * HALF) & there
            partner = tl.load(from_k + other, mask=turning, other=0.0).to(tl.float32)
            cos = tl.load(Cos + position * HALF + pair, mask=turning, other=0.0).to(tl.float32)
            sin = tl.load(Sin + position * HALF + pair, mask=turning, other=0.0).to(tl.float32)
            k = turned(k.to(tl.float32), partner, cos, sin, d, HALF, INTERLEAVED).to(k.dtype)
        v = tl.load(from_v + dv, mask=(dv < DV) & there, other=0.0)
        to_k = KCache + row * kc_row + place.to(tl.int64) * kc_step + head * kc_head
        to_v = VCache + row * vc_row + place.to(tl.int64) * vc_step + head * vc_head
        tl.store(to_k + d, k.to(KCache.dtype.element_ty), mask=(d < D) & there)
        tl.store(to_v + dv, v.to(VCache.dtype.element_ty), mask=(dv < DV) & there)
        step += queries


def kvcache_append(
    k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, cache_seqlens: Tensor, block_table: Tensor | None = None,
    cache_batch_idx: Tensor | None = None, cache_leftpad: Tensor | None = None, cu_seqlens: Tensor | None = None,
    max_seqlen_q: int = 0, rotary_cos: Tensor | None = None, rotary_sin: Tensor | None = None,
    rotary_interleaved: bool = True, k_head_scale: None = None, v_head_scale: None = None, k_token_scale: None = None,
    v_token_scale: None = None, out: None = None,
) -> None:
    k, v = unit(k), unit(v)
    ragged = cu_seqlens is not None
    batch = cache_seqlens.shape[0]
    steps = max(max_seqlen_q, 1) if ragged else k.shape[1]
    tokens = k.shape[0] if ragged else k.shape[0] * k.shape[1]
    if batch and tokens and k_cache.numel() + v_cache.numel():
        kv_heads, dim, value_dim = k.shape[-2], k.shape[-1], v.shape[-1]
        cos = tight(rotary_cos)
        with on(k):
            append[(batch * steps, kv_heads)](
                k_cache, v_cache, k, v, cache_seqlens.contiguous(), tight(cu_seqlens), block_table,
                tight(cache_batch_idx), cos, tight(rotary_sin), *strides(k_cache), *strides(v_cache),
                *strides(k, ragged), *strides(v, ragged), 0 if block_table is None else block_table.stride(0),
                tokens, steps, k_cache.shape[0], k_cache.shape[1], 0 if block_table is None else block_table.shape[1],
                0 if cos is None else cos.shape[0],
                KV_HEADS=kv_heads, D=dim, DV=value_dim, BD=power_of_two(dim), BDV=power_of_two(value_dim),
                HALF=0 if cos is None else cos.shape[1], INTERLEAVED=rotary_interleaved, num_warps=1, **OPTIONS,
            )
    torch.autograd.graph.increment_version(k_cache)
    torch.autograd.graph.increment_version(v_cache)
