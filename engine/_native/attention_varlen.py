"""Attention over ragged rows on the CPU: a cache that all rows share, or pages."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import registry
from . import _C
from .attention import _NO_ROTARY, _run, _unit_stride


def forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    block_table: Tensor | None, causal: bool, window_left: int, window_right: int, softcap: float, scale: float,
    alibi_slopes: Tensor | None, sinks: Tensor | None, out: Any = None,
) -> tuple[Tensor, Tensor]:
    cu_q, cu_k = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
    if block_table is None:     # every row's cache is all of k, its keys are slots [cu_k[b], cu_k[b + 1])
        batch = cu_k.shape[0] - 1
        k, v = (_unit_stride(x).expand(batch, *x.shape) for x in (k, v))
        cache: tuple[Any, ...] = (cu_k[1:], 0, 0, k.shape[1], batch, None, None, cu_k[:-1], cu_q)
    else:
        cache = (cu_k.diff(), 0, 0, k.shape[1], k.shape[0], block_table.contiguous(), None, None, cu_q)
    return _run(
        q, k, v, max_seqlen_q, cache, _C.Rotary(*_NO_ROTARY), False, causal, window_left, window_right, softcap, scale,
        alibi_slopes, sinks, None, None, out,
    )


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int, causal: bool, window_left: int,
    window_right: int, softcap: float, scale: float, alibi_slopes: Tensor | None, sinks: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """attention_backward of one row after another, so that a row's gradients do not depend on the others."""
    row_backward = registry.OPS["attention_backward"].impls["cpu"].function
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    dsinks = q.new_empty(0) if sinks is None else torch.zeros_like(sinks, dtype=torch.float32)
    ends_q, ends_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for b in range(len(ends_q) - 1):
        at_q, at_k = slice(ends_q[b], ends_q[b + 1]), slice(ends_k[b], ends_k[b + 1])
        slopes = alibi_slopes if alibi_slopes is None or alibi_slopes.dim() == 1 else alibi_slopes[b : b + 1]
        grads = row_backward(
            grad_out[None, at_q], None if grad_lse is None else grad_lse[None, :, at_q], q[None, at_q], k[None, at_k],
            v[None, at_k], out[None, at_q], lse[None, :, at_q], causal, window_left, window_right, softcap, scale,
            slopes, sinks, None,
        )
        dq[at_q], dk[at_k], dv[at_k] = (g[0] for g in grads[:3])
        if sinks is not None:
            dsinks += grads[3]
    return dq, dk, dv, dsinks if sinks is None else dsinks.to(sinks.dtype)
