"""The join of partial attention on the CPU and on CUDA devices."""
from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import kernels
from .attention import _floats, _unit_stride


def _flat(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """[N, B, S, H, D] and float32 [N, B, H, S]."""
    rows = math.prod(outs.shape[1:-3])
    outs = outs.reshape(outs.shape[0], rows, *outs.shape[-3:])
    return _unit_stride(outs), lses.float().reshape(lses.shape[0], rows, *lses.shape[-2:])


def merge_attention(outs: Tensor, lses: Tensor, sinks: Tensor | None, out: Any = None) -> tuple[Tensor, Tensor]:
    merged, lse = outs.new_empty(outs.shape[1:]), torch.empty(lses.shape[1:], dtype=torch.float32, device=lses.device)
    if lse.numel():
        native, place = kernels(outs)
        native.merge_attention(*_flat(outs, lses), _floats(sinks), merged, lse, place)
    return merged, lse


def merge_attention_backward(
    grad_out: Tensor, grad_lse: Tensor | None, outs: Tensor, lses: Tensor, out: Tensor, lse: Tensor,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    douts = outs.new_empty(outs.shape)
    dlses = torch.empty(lses.shape, dtype=torch.float32, device=lses.device)
    dsinks = outs.new_zeros(0 if sinks is None else lse.shape, dtype=torch.float32)
    if dlses.numel():
        native, place = kernels(outs)
        native.merge_attention_backward(
            *_flat(outs, lses), _floats(sinks), grad_out.contiguous(), _floats(grad_lse), douts, dlses,
            None if sinks is None else dsinks, place,
        )
    if sinks is None:
        return douts, dlses.to(lses.dtype), outs.new_empty(0)
    return douts, dlses.to(lses.dtype), dsinks.movedim(-2, 0).flatten(1).sum(1, dtype=torch.float64).to(sinks.dtype)
