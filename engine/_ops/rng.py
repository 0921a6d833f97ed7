"""Fake of the random numbers: they have no gradient."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import library


@torch.library.register_fake("onepass::rng_fill", lib=library)
def _fill(shape: Any, distribution: str, *args: Any, backend: str | None = None) -> Tensor:
    *_, dtype, device = args
    return torch.empty(shape, dtype=dtype, device=device)
