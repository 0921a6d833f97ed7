"""The Gumbel softmax on the CPU and on CUDA devices."""
from __future__ import annotations

from torch import Tensor

from . import empty_like, kernels


def forward(
    logits: Tensor,
    seed: int, seeds: Tensor | None, stream: int, streams: Tensor | None, offset: int, offsets: Tensor | None,
    tau: float, hard: bool, out: Tensor | None = None,
) -> Tensor:
    result = out if out is not None and out.is_contiguous() else empty_like(logits)
    if result.numel():
        native, place = kernels(logits)
        key = seed, seeds, stream, streams, offset, offsets
        native.gumbel_softmax(logits.contiguous(), None, key, tau, hard, result, place)
    return result if out is None or out is result else out.copy_(result)


def backward(
    grad: Tensor, logits: Tensor,
    seed: int, seeds: Tensor | None, stream: int, streams: Tensor | None, offset: int, offsets: Tensor | None,
    tau: float, out: None = None,
) -> Tensor:
    result = empty_like(logits)
    if result.numel():
        native, place = kernels(logits)
        key = seed, seeds, stream, streams, offset, offsets
        native.gumbel_softmax(logits.contiguous(), grad.contiguous(), key, tau, False, result, place)
    return result
