"""Paths between vectors on the CPU and on CUDA devices."""
from __future__ import annotations

import torch
from torch import Tensor

from . import empty_like, kernels, run


def forward(
    start: Tensor, end: Tensor, weight: float, weights: Tensor | None, arc: bool, out: None = None
) -> Tensor:
    result = empty_like(start)
    if result.numel():
        native, place = kernels(start)
        run(native.interpolate_forward, start, end, weight, None if weights is None else weights.float(), arc, result,
            place)
    return result


def backward(
    grad: Tensor, start: Tensor, end: Tensor, weight: float, weights: Tensor | None, arc: bool, weight_grad: bool,
    out: None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    on_start, on_end = empty_like(start), empty_like(start)
    on_weights = None
    if weight_grad and weights is not None:
        on_weights = torch.zeros(weights.shape, dtype=torch.float32, device=start.device)
    if grad.numel():
        native, place = kernels(start)
        run(native.interpolate_backward, start, end, grad, weight, None if weights is None else weights.float(), arc,
            on_start, on_end, on_weights, place)
    if on_weights is None or weights is None:
        return on_start, on_end, start.new_empty(0, dtype=torch.float32)
    return on_start, on_end, on_weights.to(weights.dtype)
