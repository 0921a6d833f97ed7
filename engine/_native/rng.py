"""Random numbers on the CPU and on CUDA devices."""
from __future__ import annotations

import torch
from torch import Tensor

from ..reference.rng import DISTRIBUTIONS
from . import DTYPES, kernels, random_keys, row_length

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
        keys, per_row = random_keys(seed, seeds, stream, streams, offset, offsets)
        rows, length = row_length(result) if per_row else (1, result.numel())
        native, place = kernels(result)
        native.rng_fill(_CODES[distribution], keys, rows, length, DTYPES.get(dtype, 0), result.data_ptr(), place)
    return result if out is None or out is result else out.copy_(result)
