"""Fakes, gradients and the FLOP count of attention over ragged rows."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import _checks as check
from . import call, differentiable, library
from .attention import lse_dtype


@torch.library.register_fake("onepass::attention_varlen_forward", lib=library)
def _forward(q: Tensor, k: Tensor, v: Tensor, *args: Any, backend: str | None = None) -> tuple[Tensor, Tensor]:
    total, heads, _ = q.shape
    return q.new_empty(total, heads, v.shape[-1]), q.new_empty(heads, total, dtype=lse_dtype(q.dtype))


@torch.library.register_fake("onepass::attention_varlen_backward", lib=library)
def _backward(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *args: Any, backend: str | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sinks = args[-1]
    dsinks = q.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dsinks


def _save(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any) -> None:
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, _, *scores, alibi_slopes, sinks = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens_q, cu_seqlens_k, alibi_slopes, sinks)
    ctx.longest, ctx.scores = (max_q, max_k), scores
    ctx.backend = keyword_only_inputs["backend"]
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, alibi_slopes, sinks = ctx.saved_tensors
    if k.dim() == 4:
        raise ValueError("k has pages, which are for inference: expected rows packed end to end where a gradient flows")
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    dq, dk, dv, dsinks = call(
        "attention_varlen_backward",
        grad_out, grad_lse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, *ctx.longest, *ctx.scores, alibi_slopes,
        sinks, backend=ctx.backend,
    )
    return dq, dk, dv, *(None,) * (5 + len(ctx.scores)), None, None if sinks is None else dsinks


differentiable("attention_varlen_forward", _save, _gradient)


def _pairs(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int) -> int:
    """Pairs of a query and a key; from the longest rows where lengths may not be read."""
    if check.readable(cu_seqlens_q, cu_seqlens_k):
        return int((cu_seqlens_q.diff().long() * cu_seqlens_k.diff()).sum())
    return (cu_seqlens_q.shape[0] - 1) * max_seqlen_q * max_seqlen_k


@register_flop_formula(torch.ops.onepass.attention_varlen_forward, get_raw=True)
def _forward_flops(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_q: int, max_k: int,
    block_table: Tensor | None, causal: bool, *args: Any, **kwargs: Any,
) -> int:
    flops = 2 * q.shape[1] * (q.shape[2] + v.shape[-1]) * _pairs(cu_seqlens_q, cu_seqlens_k, max_q, max_k)
    return flops // 2 if causal else flops


@register_flop_formula(torch.ops.onepass.attention_varlen_backward, get_raw=True)
def _backward_flops(
    grad_out: Tensor, grad_lse: Any, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor, max_q: int, max_k: int, causal: bool, *args: Any, **kwargs: Any,
) -> int:
    pairs = _pairs(cu_seqlens_q, cu_seqlens_k, max_q, max_k)
    flops = 2 * q.shape[1] * (3 * q.shape[2] + 2 * v.shape[-1]) * pairs
    return flops // 2 if causal else flops
