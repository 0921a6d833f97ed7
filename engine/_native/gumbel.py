"""The Gumbel softmax on the CPU."""
from __future__ import annotations

import torch
from torch import Tensor

from . import _C, DTYPES, random_keys


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
    threads = min(torch.get_num_threads(), groups)
    scratch = torch.empty(threads * (n + _C.GUMBEL_MARGIN), dtype=torch.float32)
    _C.gumbel_softmax(groups, n, keyed, DTYPES[logits.dtype], logits.data_ptr(), 0 if grad is None else grad.data_ptr(),
                      keys, tau, hard, out.data_ptr(), scratch.data_ptr(), threads)
