"""Attention over ragged rows on the CPU: a cache that all rows share, or pages."""
from __future__ import annotations

from typing import Any

from torch import Tensor

from .attention import _NO_ROTARY, _gradient, _run, _unit_stride


def forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    block_table: Tensor | None, causal: bool, window_left: int, window_right: int, softcap: float, scale: float,
    alibi_slopes: Tensor | None, sinks: Tensor | None, out: Any = None,
) -> tuple[Tensor, Tensor]:
    cu_q, cu_k = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
    if block_table is None:     # every row's cache is all of k, its keys are slots [cu_k[b], cu_k[b + 1])
        batch = cu_k.shape[0] - 1
        k, v = (_unit_stride(x).expand(batch, *x.shape) for x in (k, v))
        cache: tuple[Any, ...] = (cu_k[1:], 0, None, None, cu_k[:-1], cu_q)
    else:
        cache = (cu_k.diff(), 0, block_table.contiguous(), None, None, cu_q)
    return _run(
        q, k, v, max_seqlen_q, cache, _NO_ROTARY, causal, window_left, window_right, softcap, scale, alibi_slopes,
        sinks, None, None, out=out,
    )


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int, causal: bool, window_left: int,
    window_right: int, softcap: float, scale: float, alibi_slopes: Tensor | None, sinks: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    cu_q, cu_k = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
    batch = cu_k.shape[0] - 1
    dk, dv = k.new_zeros(k.shape), v.new_zeros(v.shape)
    keys, values, key_grads, value_grads = (_unit_stride(x).expand(batch, *x.shape) for x in (k, v, dk, dv))
    cache = (cu_k[1:], 0, None, None, cu_k[:-1], cu_q)
    dq, dsinks = _gradient(
        grad_out, grad_lse, q, keys, values, out, lse, max_seqlen_q, cache, key_grads, value_grads,
        _NO_ROTARY, causal, window_left, window_right, softcap, scale, alibi_slopes, sinks, None, None,
    )
    return dq, dk, dv, dsinks
