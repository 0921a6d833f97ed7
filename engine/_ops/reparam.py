"""Fakes and gradient of reparameterized sampling."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import call, differentiable, library


def _kl_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@torch.library.register_fake("onepass::reparameterize", lib=library)
def _forward(mean: Tensor, logvar: Tensor, noise: Tensor | None, *args: Any, backend: str | None = None) -> Any:
    rows = mean.shape[0] if mean.dim() else 1
    return (
        torch.empty(mean.shape, dtype=mean.dtype, device=mean.device),
        torch.empty(rows if args[-1] else 0, dtype=_kl_dtype(mean.dtype), device=mean.device),
    )


@torch.library.register_fake("onepass::reparameterize_backward", lib=library)
def _backward(
    grad_z: Tensor | None, grad_kl: Tensor | None, mean: Tensor, logvar: Tensor, noise: Tensor | None, *args: Any,
    backend: str | None = None,
) -> Any:
    like = lambda shape: torch.empty(shape, dtype=mean.dtype, device=mean.device)
    return like(mean.shape), like(mean.shape), like(mean.shape if args[-1] else 0)


def _save(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any) -> None:
    mean, logvar, noise, seed, seeds, stream, streams, offset, offsets, kl = inputs
    ctx.save_for_backward(mean, logvar, noise, seeds, streams, offsets)
    ctx.numbers = seed, stream, offset
    ctx.kl = kl
    ctx.backend = keyword_only_inputs["backend"]
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, grad_z: Tensor | None, grad_kl: Tensor | None) -> tuple[Tensor | None, ...]:
    mean, logvar, noise, seeds, streams, offsets = ctx.saved_tensors
    seed, stream, offset = ctx.numbers
    noise_grad = noise is not None and ctx.needs_input_grad[2]
    grad_mean, grad_logvar, grad_noise = call(
        "reparameterize_backward",
        grad_z, grad_kl if ctx.kl else None, mean, logvar, noise, seed, seeds, stream, streams, offset, offsets,
        noise_grad, backend=ctx.backend,
    )
    return grad_mean, grad_logvar, grad_noise if noise_grad else None, *(None,) * 7


differentiable("reparameterize", _save, _gradient)
