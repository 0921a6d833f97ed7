"""Fakes and gradient of paths between vectors."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import call, differentiable, library


@torch.library.register_fake("onepass::interpolate", lib=library)
def _forward(start: Tensor, *args: Any, backend: str | None = None) -> Tensor:
    return start.new_empty(start.shape)


@torch.library.register_fake("onepass::interpolate_backward", lib=library)
def _backward(
    grad: Tensor, start: Tensor, end: Tensor, weight: float, weights: Tensor | None, arc: bool, weight_grad: bool,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    on_start, on_end = start.new_empty(start.shape), start.new_empty(start.shape)
    if weights is None or not weight_grad:
        return on_start, on_end, start.new_empty(0, dtype=torch.float32)
    return on_start, on_end, weights.new_empty(weights.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any) -> None:
    start, end, weight, weights, arc = inputs
    ctx.save_for_backward(start, end, weights)
    ctx.options = weight, arc
    ctx.backend = keyword_only_inputs["backend"]


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    start, end, weights = ctx.saved_tensors
    weight, arc = ctx.options
    weight_grad = weights is not None and ctx.needs_input_grad[3]
    on_start, on_end, on_weights = call(
        "interpolate_backward", grad, start, end, weight, weights, arc, weight_grad, backend=ctx.backend
    )
    return on_start, on_end, None, on_weights if weight_grad else None, None


differentiable("interpolate", _save, _gradient)
