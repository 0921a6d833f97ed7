"""Attention over a key-value cache in plain PyTorch: appending, rotary embedding, pages, ragged queries, tree masks.

Batched over the whole capacity of the cache, so that nothing depends on a length on the host; slots that hold no key
are cleared before they meet arithmetic. Rotary embedding: Su et al. 2021, eq. 34; tree masks: Miao et al. 2023
(SpecInfer).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .attention import attend, inside

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}  # of the codes of a quantized cache


def kvcache_append(
    k_cache: Tensor,  # [Bc, capacity, Hkv, D], or [pages, page_size, Hkv, D] with block_table; written in place
    v_cache: Tensor,  # [Bc, capacity, Hkv, Dv] or [pages, page_size, Hkv, Dv]; written in place
    k: Tensor,  # [B, Sn, Hkv, D], or [total, Hkv, D] with cu_seqlens
    v: Tensor,  # [B, Sn, Hkv, Dv], or [total, Hkv, Dv] with cu_seqlens
    cache_seqlens: Tensor,  # [B] int32, keys in the cache before the append
    block_table: Tensor | None = None,  # [B, blocks] int32
    cache_batch_idx: Tensor | None = None,  # [B] int32, the cache row of each batch row
    cache_leftpad: Tensor | None = None,  # [B] int32; as max_seqlen_q, of the attention that follows: checked with it
    cu_seqlens: Tensor | None = None,  # [B + 1] int32
    max_seqlen_q: int = 0,
    rotary_cos: Tensor | None = None,  # [positions, rotary_dim / 2]
    rotary_sin: Tensor | None = None,
    rotary_interleaved: bool = True,
    k_head_scale: Tensor | None = None,  # [B, Hkv] float32, of a cache of codes
    v_head_scale: Tensor | None = None,
    k_token_scale: Tensor | None = None,  # as k_cache without its last dim, float32; written
    v_token_scale: Tensor | None = None,
) -> None:
    """Writes key t of row b to slot cache_seqlens[b] + t, rotated to that position. Tokens out of range are skipped.

    Into a cache of codes they go unrounded: see `quantize`.
    """
    rows, steps = rows_and_steps(k, cu_seqlens)
    position = cache_seqlens.long()[rows] + steps
    quantized = k_cache.dtype in LARGEST
    if quantized:
        k = k.to(torch.promote_types(k.dtype, torch.float32))
    if rotary_cos is not None and rotary_sin is not None:
        k = rotate(k, position, rotary_cos, rotary_sin, rotary_interleaved)
    slots, valid = slots_of(position, rows, k_cache, block_table, cache_batch_idx)
    for x, cache, per_head, per_token in (
        (k, k_cache, k_head_scale, k_token_scale), (v, v_cache, v_head_scale, v_token_scale),
    ):  # fmt: skip
        if quantized:
            if per_token is not None:
                amax = x.to(torch.promote_types(x.dtype, torch.float32)).abs().amax(-1)
                scale = (amax / torch.full_like(amax, LARGEST[cache.dtype])).float()
                _write(per_token, scale.flatten(0, -2), slots.flatten(), valid.flatten())
            else:
                scale = torch.ones((), device=x.device) if per_head is None else per_head[rows]
            x, cache = quantize(x, scale, cache.dtype).view(torch.uint8), cache.view(torch.uint8)
        _write(cache, x.flatten(0, -3), slots.flatten(), valid.flatten())


def kvcache_attention(
    q: Tensor,  # [B, Sq, H, D], or [total, H, D] with cu_seqlens_q
    k_cache: Tensor,  # [Bc, capacity, Hkv, D], or [pages, page_size, Hkv, D] with block_table
    v_cache: Tensor,  # as k_cache, Dv
    cache_seqlens: Tensor,  # [B] int32, keys before the append
    appended: int,  # keys appended to every row since; -1: as many as the row has queries
    block_table: Tensor | None,  # [B, blocks] int32
    cache_batch_idx: Tensor | None,  # [B] int32
    cache_leftpad: Tensor | None,  # [B] int32, slots before a row's first key
    cu_seqlens_q: Tensor | None,  # [B + 1] int32
    max_seqlen_q: int,  # the longest row of queries
    rotary_cos: Tensor | None,  # [positions, rotary_dim / 2]
    rotary_sin: Tensor | None,
    rotary_interleaved: bool,
    causal: bool,
    window_left: int,
    window_right: int,
    softcap: float,
    scale: float,
    alibi_slopes: Tensor | None = None,  # [H] or [B, H]
    sinks: Tensor | None = None,  # [H]
    tree_mask: Tensor | None = None,  # [B, max_seqlen_q, max_seqlen_q] bool, over the last keys
    k_scale: Tensor | None = None,  # of a cache of codes: [B, Hkv] or as k_cache without its last dim
    v_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # out as q with Dv, lse [B, H, Sq] or [H, total]
    """Attention of each row's queries, its last tokens, over its keys [leftpad, cache_seqlens + appended).

    Queries rotate at cache_seqlens + i where order matters (causal, window or tree), else all at cache_seqlens.
    """
    batch = cache_seqlens.shape[0]
    rows, steps = rows_and_steps(q, cu_seqlens_q)
    if rotary_cos is not None and rotary_sin is not None:
        ordered = causal or window_left >= 0 or window_right >= 0 or tree_mask is not None
        q = rotate(
            q, cache_seqlens.long()[rows] + (steps if ordered else 0), rotary_cos, rotary_sin, rotary_interleaved
        )
    count = _counts(cu_seqlens_q, batch, max_seqlen_q, q.device)
    if cu_seqlens_q is not None:  # ragged: spread over [B, max_seqlen_q], gathered back at the end
        starts = cu_seqlens_q.long()[:-1]
        spread = starts[:, None] + torch.arange(max_seqlen_q, device=q.device)
        padded = (
            q[spread.clamp(0, max(q.shape[0] - 1, 0))] if q.shape[0] else q.new_zeros(batch, max_seqlen_q, *q.shape[1:])
        )
    else:
        padded = q
    total = cache_seqlens.long() + (count if appended < 0 else appended)
    first = torch.zeros_like(total) if cache_leftpad is None else cache_leftpad.long()

    capacity = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    keys = torch.arange(capacity, device=q.device).expand(batch, capacity)
    slots, valid = slots_of(keys, torch.arange(batch, device=q.device)[:, None], k_cache, block_table, cache_batch_idx)
    valid = valid & (keys >= first[:, None]) & (keys < total[:, None])
    keys_read, values_read = (
        read(cache, slots, valid) if cache.dtype not in LARGEST else _read_codes(cache, scale, slots, valid, q.dtype)
        for cache, scale in ((k_cache, k_scale), (v_cache, v_scale))
    )

    row = torch.arange(max_seqlen_q, device=q.device)
    distance = (total - count)[:, None, None] + row[:, None] - keys[:, None, :]  # [B, Sq, capacity]
    allowed = inside(distance, causal, window_left, window_right) & valid[:, None, :]
    if tree_mask is not None:
        column = keys - (total - count)[:, None]  # which query a key belongs to; negative: an older key
        seen = (
            tree_mask.gather(2, column.clamp(0, max_seqlen_q - 1)[:, None, :].expand_as(allowed))
            if max_seqlen_q
            else allowed
        )
        allowed = allowed & (seen | (column < 0)[:, None, :])
    out, lse = attend(padded, keys_read, values_read, distance, allowed, softcap, scale, alibi_slopes, sinks, None)
    if cu_seqlens_q is None:
        return out, lse
    return out[rows, steps], lse.transpose(1, 2)[rows, steps].t().contiguous()


def quantize(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:  # [..., Hkv, D], [..., Hkv] or []
    """Codes: x / scale rounded to the nearest, ties to even, saturating; an int8's NaN is 0.

    Zeros have the code of zero whatever the scale, so the scale of a token of zeros may be 0.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    quotient = torch.where(x == 0, 0, x / scale.to(x.dtype)[..., None]).clamp(-LARGEST[dtype], LARGEST[dtype])
    return (quotient.nan_to_num(0).round() if dtype == torch.int8 else quotient).to(dtype)


def _read_codes(cache: Tensor, scale: Tensor | None, slots: Tensor, valid: Tensor, dtype: torch.dtype) -> Tensor:
    """`read` of a cache of codes, dequantized."""
    values = read(cache.view(torch.uint8), slots, valid).view(cache.dtype)
    values = values.to(torch.promote_types(dtype, torch.float32))
    if scale is None:
        return values
    per_head = scale[:, None] if scale.dim() == 2 else read(scale[..., None], slots, valid)[..., 0]
    return (values * per_head.to(values.dtype)[..., None]).masked_fill(~valid[..., None, None], 0)


def rotate(
    x: Tensor,  # [..., H, D]
    position: Tensor,  # [...] int64
    cos: Tensor,  # [positions, rotary_dim / 2]
    sin: Tensor,
    interleaved: bool,  # pairs (2i, 2i + 1), else (i, i + rotary_dim / 2)
) -> Tensor:
    """Rotates pair i of the first rotary_dim channels by the angle of (position, i); the other channels pass."""
    wide = torch.promote_types(x.dtype, torch.float32)
    half = cos.shape[1]
    position = position.clamp(0, cos.shape[0] - 1)
    c, s = cos.to(wide)[position][..., None, :], sin.to(wide)[position][..., None, :]
    turned = x[..., : 2 * half].to(wide)
    a, b = turned.unflatten(-1, (half, 2)).unbind(-1) if interleaved else turned.split(half, -1)
    pair = (a * c - b * s, b * c + a * s)
    turned = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat([turned.to(x.dtype), x[..., 2 * half :]], -1)


def rows_and_steps(x: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Batch row and place in the row of every token: [B, 1] and [S], or [total] and [total] for ragged rows."""
    if cu_seqlens is None:
        return torch.arange(x.shape[0], device=x.device)[:, None], torch.arange(x.shape[1], device=x.device)
    tokens = torch.arange(x.shape[0], device=x.device)
    starts = cu_seqlens.long()
    rows = (torch.searchsorted(starts, tokens, right=True) - 1).clamp(0, max(starts.shape[0] - 2, 0))
    return rows, tokens - starts[rows]


def _counts(cu_seqlens: Tensor | None, batch: int, length: int, device: torch.device) -> Tensor:  # queries of each row
    return torch.full((batch,), length, device=device) if cu_seqlens is None else cu_seqlens.long().diff()


def slots_of(
    position: Tensor,  # [...] index of a key in its row
    rows: Tensor,  # broadcastable to position
    cache: Tensor,
    block_table: Tensor | None,
    cache_batch_idx: Tensor | None,
) -> tuple[Tensor, Tensor]:  # slot in cache.flatten(0, 1), and whether it exists
    size = cache.shape[1]
    if block_table is not None:
        block = torch.div(position, max(size, 1), rounding_mode="floor")
        valid = (block >= 0) & (block < block_table.shape[1])
        if block_table.shape[1] == 0:
            return position, valid
        page = block_table.long()[rows.expand_as(position), block.clamp(0, block_table.shape[1] - 1)]
        return page * size + position % max(size, 1), valid & (page >= 0) & (page < cache.shape[0])
    row = rows if cache_batch_idx is None else cache_batch_idx.long()[rows]
    return row * size + position, (position >= 0) & (position < size) & (row >= 0) & (row < cache.shape[0])


def _write(cache: Tensor, values: Tensor, slots: Tensor, valid: Tensor) -> None:
    """cache.flatten(0, 1)[slots[valid]] = values[valid], without a count of the valid on the host."""
    if slots.numel() == 0 or cache.shape[0] * cache.shape[1] == 0:
        return
    # A token that may not be written repeats the first one that may; if there is none, it puts back what is there.
    source = torch.where(valid, torch.arange(slots.numel(), device=slots.device), valid.int().argmax())
    slots = slots[source].clamp(0, cache.shape[0] * cache.shape[1] - 1)
    index = (torch.div(slots, cache.shape[1], rounding_mode="floor"), slots % cache.shape[1])
    cache[index] = torch.where(valid.any(), values[source].to(cache.dtype), cache[index])


def read(cache: Tensor, slots: Tensor, valid: Tensor) -> Tensor:
    """cache.flatten(0, 1)[slots] with zeros where not valid.   [B, capacity, Hkv, D]"""
    if cache.shape[0] * cache.shape[1] == 0:
        return cache.new_zeros(*slots.shape, *cache.shape[2:])
    slots = slots.clamp(0, cache.shape[0] * cache.shape[1] - 1)
    gathered = cache[torch.div(slots, cache.shape[1], rounding_mode="floor"), slots % cache.shape[1]]
    return gathered.masked_fill(~valid[..., None, None], 0)
