"""Random numbers on the CPU and on CUDA devices."""
from __future__ import annotations

import torch
from torch import Tensor

from ..reference.rng import DISTRIBUTIONS
from . import kernels

_CODES = {name: code for code, name in enumerate((*DISTRIBUTIONS, "bits"))}


def fill(
    shape: list[int],
    distribution: str,
    seed: int, seeds: Tensor | None,
    stream: int, streams: Tensor | None,
    offset: int, offsets: Tensor | None,
    dtype: torch.dtype,
    device: torch.device,
    out: Tensor | None = None,
) -> Tensor:
    result = out if out is not None and out.is_contiguous() else torch.empty(shape, dtype=dtype, device=device)
    if result.numel():
        native, place = kernels(result)
        native.rng_fill(_CODES[distribution], (seed, seeds, stream, streams, offset, offsets), result, place)
    return result if out is None or out is result else out.copy_(result)
