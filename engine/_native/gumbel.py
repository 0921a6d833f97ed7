"""The Gumbel softmax on the CPU and on CUDA devices."""
from __future__ import annotations

import torch
from torch import Tensor

from . import _C, DTYPES, kernels, on_device, pointer, random_keys


def forward(
    logits: Tensor,
    seed: int, seeds: Tensor | None, stream: int, streams: Tensor | None, offset: int, offsets: Tensor | None,
    tau: float, hard: bool, out: Tensor | None = None,
) -> Tensor:
    given, logits = out, logits.contiguous()
    result = given if given is not None and given.is_contiguous() else logits.new_empty(logits.shape)
    _run(logits, None, (seed, seeds, stream, streams, offset, offsets), tau, hard, result)
    return result if given is None or given is result else given.copy_(result)


def backward(
    grad: Tensor, logits: Tensor,
    seed: int, seeds: Tensor | None, stream: int, streams: Tensor | None, offset: int, offsets: Tensor | None,
    tau: float, out: None = None,
) -> Tensor:
    grad, logits = grad.contiguous(), logits.contiguous()
    result = logits.new_empty(logits.shape)
    _run(logits, grad, (seed, seeds, stream, streams, offset, offsets), tau, False, result)
    return result


def _run(
    logits: Tensor, grad: Tensor | None, parts: tuple[int, Tensor | None, int, Tensor | None, int, Tensor | None],
    tau: float, hard: bool, out: Tensor,
) -> None:
    if not out.numel():
        return
    keys, per_row = random_keys(*parts)
    n = logits.shape[-1]
    groups = logits.numel() // n
    keyed = groups // logits.shape[0] if per_row else groups        # groups that share a key and count on
    call = (groups, n, keyed, DTYPES[logits.dtype], logits.data_ptr(), pointer(grad), keys, tau, hard, out.data_ptr())
    native, place = kernels(logits)
    if on_device(logits):
        native.gumbel_softmax(*call, place)
        return
    threads = min(place, groups)
    scratch = torch.empty(threads * (n + _C.GUMBEL_MARGIN), dtype=torch.float32)
    native.gumbel_softmax(*call, scratch.data_ptr(), threads)
