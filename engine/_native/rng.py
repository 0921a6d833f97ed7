"""Random numbers on the CPU."""
from __future__ import annotations

import math

import torch
from torch import Tensor

from ..reference.rng import DISTRIBUTIONS
from . import _C, DTYPES, key_part


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
    direct = out is not None and out.is_contiguous()
    result = out if direct else torch.empty(shape, dtype=dtype)
    assert result is not None
    rows = shape[0] if any(k is not None and k.dim() for k in (seeds, streams, offsets)) else 1
    if result.numel():
        _C.rng_fill(
            DISTRIBUTIONS.index(distribution), key_part(seed, seeds), key_part(stream, streams),
            key_part(offset, offsets), rows, math.prod(shape) // rows, DTYPES[dtype], result.data_ptr(),
            torch.get_num_threads(),
        )
    return result if direct or out is None else out.copy_(result)
