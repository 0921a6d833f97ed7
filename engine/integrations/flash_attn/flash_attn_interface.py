"""flash-attn 2's functions, argument for argument. Shapes are [B, S, H, D], ragged ones [total, H, D]."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .common import cached, dense, ragged, refuse, split_kv, split_qkv


def _result(out: Tensor, lse: Tensor, return_attn_probs: bool) -> Any:
    """(out, softmax_lse, S_dmask) where asked: without dropout the third is empty, as in flash-attn."""
    return (out, lse, torch.empty(0, dtype=out.dtype, device=out.device)) if return_attn_probs else out


def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
                    alibi_slopes=None, deterministic=False, return_attn_probs=False):
    """`onepass.attention`. dropout_p above 0 is refused."""
    refuse(dropout_p=dropout_p)
    return _result(*dense(q, k, v, softmax_scale, causal, window_size, softcap, alibi_slopes), return_attn_probs)


def flash_attn_kvpacked_func(q, kv, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
                             alibi_slopes=None, deterministic=False, return_attn_probs=False):
    """`flash_attn_func` of kv [B, S, 2, Hkv, D]."""
    return flash_attn_func(q, *split_kv(kv), dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
                           deterministic, return_attn_probs)


def flash_attn_qkvpacked_func(qkv, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
                              alibi_slopes=None, deterministic=False, return_attn_probs=False):
    """`flash_attn_func` of qkv [B, S, 3, H, D]."""
    return flash_attn_func(*split_qkv(qkv), dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
                           deterministic, return_attn_probs)


def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
                           softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
                           deterministic=False, return_attn_probs=False, block_table=None):
    """`onepass.attention_varlen`. dropout_p above 0 is refused."""
    refuse(dropout_p=dropout_p)
    out, lse = ragged(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal,
                      window_size, softcap, alibi_slopes, block_table)
    return _result(out, lse, return_attn_probs)


def flash_attn_varlen_kvpacked_func(q, kv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
                                    softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
                                    alibi_slopes=None, deterministic=False, return_attn_probs=False):
    """`flash_attn_varlen_func` of kv [total, 2, Hkv, D]."""
    return flash_attn_varlen_func(q, *split_kv(kv), cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
                                  softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
                                  return_attn_probs)


def flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, max_seqlen, dropout_p=0.0, softmax_scale=None, causal=False,
                                     window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
                                     return_attn_probs=False):
    """`flash_attn_varlen_func` of qkv [total, 3, H, D]."""
    return flash_attn_varlen_func(*split_qkv(qkv), cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p,
                                  softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
                                  return_attn_probs)


def flash_attn_with_kvcache(q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None,
                            cache_seqlens: int | Tensor | None = None, cache_batch_idx: Tensor | None = None,
                            cache_leftpad: Tensor | None = None, block_table: Tensor | None = None, softmax_scale=None,
                            causal=False, window_size=(-1, -1), softcap=0.0, rotary_interleaved=True,
                            alibi_slopes=None, num_splits=0, return_softmax_lse=False):
    """`onepass.attention_with_kvcache`: appends k and v in place at cache_seqlens, then attends."""
    out, lse = cached(
        q, k_cache, v_cache, k, v, cache_seqlens=cache_seqlens, block_table=block_table, window_size=window_size,
        softmax_scale=softmax_scale, cache_batch_idx=cache_batch_idx, cache_leftpad=cache_leftpad,
        rotary_cos=rotary_cos, rotary_sin=rotary_sin, rotary_interleaved=rotary_interleaved, causal=causal,
        softcap=softcap, alibi_slopes=alibi_slopes,
    )
    return (out, lse) if return_softmax_lse else out
