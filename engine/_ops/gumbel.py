"""Fakes and gradient of the Gumbel softmax."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import call, differentiable, library


@torch.library.register_fake("onepass::gumbel_softmax", lib=library)
def _forward(logits: Tensor, *args: Any, backend: str | None = None) -> Tensor:
    return logits.new_empty(logits.shape)


@torch.library.register_fake("onepass::gumbel_softmax_backward", lib=library)
def _backward(grad: Tensor, logits: Tensor, *args: Any, backend: str | None = None) -> Tensor:
    return logits.new_empty(logits.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any) -> None:
    logits, seed, seeds, stream, streams, offset, offsets, tau, _hard = inputs
    ctx.save_for_backward(logits, seeds, streams, offsets)
    ctx.numbers = seed, stream, offset, tau
    ctx.backend = keyword_only_inputs["backend"]


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    logits, seeds, streams, offsets = ctx.saved_tensors
    seed, stream, offset, tau = ctx.numbers
    grad_logits = call(
        "gumbel_softmax_backward", grad, logits, seed, seeds, stream, streams, offset, offsets, tau, backend=ctx.backend
    )
    return grad_logits, *(None,) * 8


differentiable("gumbel_softmax", _save, _gradient)
