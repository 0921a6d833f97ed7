"""The functions of flash-attn 3 with their own signatures: `import onepass.integrations.flash_attn_3`.

The interface is that of github.com/Dao-AILab/flash-attention, hopper/flash_attn_interface.py. `deterministic`,
`num_splits`, `pack_gqa`, `sm_margin` and `scheduler_metadata` steer a GPU's schedule and change no result: they are
taken and have no effect. Of quantized tensors the cache is taken, with `k_descale` and `v_descale`; other scales, `qv`,
`attention_chunk`, `rotary_seqlens`, `seqused_q` and `seqused_k` are refused by name.
"""
from __future__ import annotations

from torch import Tensor

from .. import merge_attention
from .._attention_checks import CODES
from .flash_attn.common import cached, dense, ragged, refuse, split_qkv


def flash_attn_func(q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
                    window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None,
                    deterministic=False, sm_margin=0, return_attn_probs=False):
    """`onepass.attention`; with return_attn_probs also the LSE."""
    refuse(qv=qv, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale, attention_chunk=attention_chunk)
    out, lse = dense(q, k, v, softmax_scale, causal, window_size, softcap)
    return (out, lse) if return_attn_probs else out


def flash_attn_qkvpacked_func(qkv, softmax_scale=None, causal=False, q_descale=None, k_descale=None, v_descale=None,
                              window_size=(-1, -1), attention_chunk=0, softcap=0.0, deterministic=False,
                              num_heads_q=None, sm_margin=0, return_attn_probs=False):
    """`flash_attn_func` of qkv [B, S, 3, H, D], or of [B, S, H + 2 Hkv, D] with num_heads_q."""
    return flash_attn_func(
        *split_qkv(qkv, None if qkv.dim() == 5 else num_heads_q), softmax_scale, causal, None, q_descale, k_descale,
        v_descale, window_size, attention_chunk, softcap, return_attn_probs=return_attn_probs,
    )


def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None,
                           seqused_k=None, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None,
                           v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1,
                           pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False):
    """`onepass.attention_varlen`; with return_attn_probs also the LSE."""
    refuse(seqused_q=seqused_q, seqused_k=seqused_k, qv=qv, q_descale=q_descale, k_descale=k_descale,
           v_descale=v_descale, attention_chunk=attention_chunk)
    out, lse = ragged(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal,
                      window_size, softcap)
    return (out, lse) if return_attn_probs else out


def flash_attn_with_kvcache(q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None, rotary_sin=None,
                            cache_seqlens: int | Tensor | None = None, cache_batch_idx: Tensor | None = None,
                            cache_leftpad: Tensor | None = None, page_table: Tensor | None = None,
                            cu_seqlens_q: Tensor | None = None, cu_seqlens_k_new: Tensor | None = None,
                            max_seqlen_q: int | None = None, rotary_seqlens: Tensor | None = None,
                            q_descale: Tensor | None = None, k_descale: Tensor | None = None,
                            v_descale: Tensor | None = None, softmax_scale=None, causal=False, window_size=(-1, -1),
                            attention_chunk=0, softcap=0.0, rotary_interleaved=True, scheduler_metadata=None,
                            num_splits=0, pack_gqa=None, sm_margin=0, return_softmax_lse=False):
    """`onepass.attention_with_kvcache`: appends k and v in place at cache_seqlens, then attends.

    Ragged calls append as many keys as a row has queries: cu_seqlens_k_new must be cu_seqlens_q itself. With a cache of
    float8_e4m3fn (or int8) q, k and v are float32, bfloat16 or float16; k_descale and v_descale, [B, Hkv], are k_scale
    and v_scale, and appended values are divided by them.
    """
    refuse(qv=qv, rotary_seqlens=rotary_seqlens, q_descale=q_descale, attention_chunk=attention_chunk)
    if k_cache.dtype not in CODES:
        refuse(k_descale=k_descale, v_descale=v_descale)
    if k is not None and cu_seqlens_k_new is not cu_seqlens_q:
        raise ValueError("cu_seqlens_k_new: expected the tensor given as cu_seqlens_q, each query bringing its key")
    out, lse = cached(
        q, k_cache, v_cache, k, v, cache_seqlens=cache_seqlens, block_table=page_table, window_size=window_size,
        softmax_scale=softmax_scale, cache_batch_idx=cache_batch_idx, cache_leftpad=cache_leftpad,
        cu_seqlens_q=cu_seqlens_q, max_seqlen_q=max_seqlen_q if cu_seqlens_q is not None else None,
        rotary_cos=rotary_cos, rotary_sin=rotary_sin, rotary_interleaved=rotary_interleaved, causal=causal,
        softcap=softcap, k_scale=k_descale, v_scale=v_descale,
    )
    return (out, lse) if return_softmax_lse else out


def flash_attn_combine(out_partial, lse_partial, out=None, out_dtype=None):
    """`onepass.merge_attention` of out_partial [N, B, S, H, D] with lse_partial [N, B, S, H]: (out, lse [B, S, H])."""
    merged, lse = merge_attention(out_partial, lse_partial.transpose(-1, -2))
    merged = merged if out_dtype is None else merged.to(out_dtype)
    return (merged if out is None else out.copy_(merged)), lse.transpose(-1, -2)


__all__ = [
    "flash_attn_combine",
    "flash_attn_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
]
