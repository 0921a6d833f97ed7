"""Paths between vectors on the CPU and on CUDA devices."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _C, DTYPES, by_rows, kernels, on_device, pointer


def _call(
    start: Tensor, end: Tensor, grad: Tensor | None, weight: float, weights: Tensor | None, arc: bool, summed: bool
) -> tuple[Any, Any, tuple[Any, ...], Tensor | None, tuple[Tensor | None, ...]]:
    """The kernels of start's device, the call as they take it, what they take after everything else, the partial sums,
    and what has to live until the kernel has run."""
    rows, groups, length = start.shape
    (a, a_step), (b, b_step) = by_rows(start, groups * length), by_rows(end, groups * length)
    g, g_step = (None, 0) if grad is None else by_rows(grad, groups * length)
    t = None if weights is None else weights.float()
    native, place = kernels(start)
    device = on_device(start)
    call = _C.Interpolate(
        rows, groups, length, DTYPES[start.dtype], a.data_ptr(), a_step, b.data_ptr(), b_step, pointer(g), g_step,
        weight, pointer(t), t.stride(0) if t is not None and t.dim() else 0, arc, 0 if device else place,
    )
    partial = None
    if summed and device:
        size = rows * groups * native.interpolate_workspace(length)
        partial = torch.empty(size, dtype=torch.uint8, device=start.device)
    elif summed and length > _C.INTERPOLATE_TILE:
        partial = torch.empty(-(-length // _C.INTERPOLATE_TILE) * _C.PAIR_SUMS, dtype=torch.float64)
    return native, call, (place,) if device else (), partial, (a, b, g, t)


def forward(
    start: Tensor, end: Tensor, weight: float, weights: Tensor | None, arc: bool, out: None = None
) -> Tensor:
    result = start.new_empty(start.shape)
    if result.numel():
        native, call, place, partial, _kept = _call(start, end, None, weight, weights, arc, arc)
        native.interpolate_forward(call, result.data_ptr(), pointer(partial), *place)
    return result


def backward(
    grad: Tensor, start: Tensor, end: Tensor, weight: float, weights: Tensor | None, arc: bool, weight_grad: bool,
    out: None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    on_start, on_end = start.new_empty(start.shape), start.new_empty(start.shape)
    on_weights = vectors = None
    if weight_grad and weights is not None:
        on_weights = torch.zeros(weights.shape, dtype=torch.float32, device=start.device)
        vectors = torch.empty(start.shape[:2], dtype=torch.float64, device=start.device)
    if grad.numel():
        native, call, place, partial, _kept = _call(
            start, end, grad, weight, weights, arc, arc or on_weights is not None
        )
        native.interpolate_backward(
            call, on_start.data_ptr(), on_end.data_ptr(), pointer(on_weights), pointer(vectors), pointer(partial),
            *place,
        )
    if on_weights is None or weights is None:
        return on_start, on_end, start.new_empty(0, dtype=torch.float32)
    return on_start, on_end, on_weights.to(weights.dtype)
