"""Fakes, gradients and the FLOP count of attention."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import call, differentiable, library


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


@torch.library.register_fake("onepass::attention_forward", lib=library)
def _forward(q: Tensor, k: Tensor, v: Tensor, *args: Any, backend: str | None = None) -> tuple[Tensor, Tensor]:
    batch, sq, heads, _ = q.shape
    return q.new_empty(batch, sq, heads, v.shape[3]), q.new_empty(batch, heads, sq, dtype=lse_dtype(q.dtype))


@torch.library.register_fake("onepass::attention_backward", lib=library)
def _backward(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *args: Any, backend: str | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sinks = args[-2]
    dsinks = q.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dsinks


@torch.library.register_fake("onepass::kvcache_append", lib=library)
def _append(*args: Any, backend: str | None = None) -> None:
    return None


@torch.library.register_fake("onepass::kvcache_attention", lib=library)
def _cached(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, *args: Any, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    rows, heads = ((q.shape[0],), q.shape[2]) if q.dim() == 4 else ((), q.shape[1])
    length = q.shape[1] if q.dim() == 4 else q.shape[0]
    lse = q.new_empty(*rows, heads, length, dtype=lse_dtype(q.dtype))
    return q.new_empty(*q.shape[:-1], v_cache.shape[3]), lse


@torch.library.register_fake("onepass::merge_attention", lib=library)
def _merge(outs: Tensor, lses: Tensor, sinks: Tensor | None, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    return outs.new_empty(outs.shape[1:]), lses.new_empty(lses.shape[1:], dtype=lse_dtype(lses.dtype))


@torch.library.register_fake("onepass::merge_attention_backward", lib=library)
def _merge_backward(
    grad_out: Tensor, grad_lse: Tensor | None, outs: Tensor, lses: Tensor, out: Tensor, lse: Tensor,
    sinks: Tensor | None, *, backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    dsinks = outs.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)
    return outs.new_empty(outs.shape), lses.new_empty(lses.shape), dsinks


def _save(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any) -> None:
    q, k, v, *options, alibi_slopes, sinks, mask = inputs
    ctx.save_for_backward(q, k, v, *output, alibi_slopes, sinks, mask)
    ctx.options = options
    ctx.backend = keyword_only_inputs["backend"]
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, alibi_slopes, sinks, mask = ctx.saved_tensors
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    dq, dk, dv, dsinks = call(
        "attention_backward",
        grad_out, grad_lse, q, k, v, out, lse, *ctx.options, alibi_slopes, sinks, mask, backend=ctx.backend
    )
    return dq, dk, dv, *(None,) * len(ctx.options), None, None if sinks is None else dsinks, None


def _merge_save(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any) -> None:
    outs, lses, sinks = inputs
    ctx.save_for_backward(outs, lses, *output, sinks)
    ctx.backend = keyword_only_inputs["backend"]
    ctx.set_materialize_grads(False)


def _merge_gradient(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    outs, lses, out, lse, sinks = ctx.saved_tensors
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    douts, dlses, dsinks = call(
        "merge_attention_backward",
        grad_out, grad_lse, outs, lses, out, lse, sinks, backend=ctx.backend
    )
    return douts, dlses, None if sinks is None else dsinks


differentiable("attention_forward", _save, _gradient)
differentiable("merge_attention", _merge_save, _merge_gradient)


def _pair_flops(q_shape: Any, k_shape: Any, v_shape: Any, causal: bool) -> int:
    batch, sq, heads, dim = q_shape
    flops = 2 * batch * heads * sq * k_shape[1] * (dim + v_shape[3])
    return flops // 2 if causal else flops


@register_flop_formula(torch.ops.onepass.attention_forward)
def _forward_flops(q_shape: Any, k_shape: Any, v_shape: Any, causal: bool, *args: Any, **kwargs: Any) -> int:
    """Two products of Sq x Sk x D; causal counts half."""
    return _pair_flops(q_shape, k_shape, v_shape, causal)


@register_flop_formula(torch.ops.onepass.attention_backward)
def _backward_flops(
    grad: Any, grad_lse: Any, q_shape: Any, k_shape: Any, v_shape: Any, forward_out: Any, lse: Any,
    causal: bool, *args: Any, **kwargs: Any,
) -> int:
    """Five products: the scores again, dp, dq, dk and dv."""
    batch, sq, heads, dim = q_shape
    flops = 2 * batch * heads * sq * k_shape[1] * (3 * dim + 2 * v_shape[3])
    return flops // 2 if causal else flops
