"""What the interfaces of flash-attn 2 and 3 share."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import attention, attention_varlen, attention_with_kvcache


def refuse(**arguments: Any) -> None:
    """Raises ValueError for an argument that is not at its default: what onepass does not take."""
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            raise ValueError(f"{name} is a tensor {tuple(value.shape)}: onepass does not take it, expected None")
        if value is not None and value != 0:
            raise ValueError(f"{name}={value}: onepass does not take it, expected the default")


def window(size: Any) -> tuple[int, int]:
    """A window whose open sides are -1; flash-attn writes any negative number or None."""
    left, right = (-1 if w is None or w < 0 else w for w in size)
    return left, right


def split_qkv(qkv: Tensor, num_heads_q: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of [..., 3, H, D], or of [..., H + 2 Hkv, D] where num_heads_q is told."""
    if num_heads_q is None:
        if qkv.dim() < 3 or qkv.shape[-3] != 3:
            raise ValueError(f"qkv has shape {tuple(qkv.shape)}, expected [..., 3, H, D]")
        q, k, v = qkv.unbind(-3)
        return q, k, v
    kv_heads = (qkv.shape[-2] - num_heads_q) // 2
    if kv_heads < 1 or num_heads_q + 2 * kv_heads != qkv.shape[-2]:
        raise ValueError(f"num_heads_q={num_heads_q}: qkv has {qkv.shape[-2]} heads, expected num_heads_q + 2 Hkv")
    q, k, v = qkv.split([num_heads_q, kv_heads, kv_heads], -2)
    return q, k, v


def split_kv(kv: Tensor) -> tuple[Tensor, Tensor]:
    if kv.dim() < 3 or kv.shape[-3] != 2:
        raise ValueError(f"kv has shape {tuple(kv.shape)}, expected [..., 2, Hkv, D]")
    k, v = kv.unbind(-3)
    return k, v


def dense(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None, causal: bool, window_size: Any, softcap: float,
          alibi_slopes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    out = attention(
        q, k, v, causal=causal, window=window(window_size), softcap=softcap, scale=softmax_scale,
        alibi_slopes=alibi_slopes, return_lse=True,
    )
    assert isinstance(out, tuple)
    return out


def ragged(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
           max_seqlen_k: int, softmax_scale: float | None, causal: bool, window_size: Any, softcap: float,
           alibi_slopes: Tensor | None = None, block_table: Tensor | None = None) -> tuple[Tensor, Tensor]:
    out = attention_varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_table=block_table, causal=causal,
        window=window(window_size), softcap=softcap, scale=softmax_scale, alibi_slopes=alibi_slopes, return_lse=True,
    )
    assert isinstance(out, tuple)
    return out


def cached(q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None, v: Tensor | None, *,
           cache_seqlens: int | Tensor | None, block_table: Tensor | None, window_size: Any,
           softmax_scale: float | None, **options: Any) -> tuple[Tensor, Tensor]:
    """attention_with_kvcache; without cache_seqlens the cache is full. No gradient flows, as in flash-attn."""
    if cache_seqlens is None:
        if k is not None:
            raise ValueError("cache_seqlens is None: expected an int or an int32 tensor [B] where k and v are appended")
        cache_seqlens = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    with torch.no_grad():
        out = attention_with_kvcache(
            q, k_cache, v_cache, k, v, cache_seqlens=cache_seqlens, block_table=block_table, scale=softmax_scale,
            window=window(window_size), return_lse=True, **options,
        )
    assert isinstance(out, tuple)
    return out
