"""Fake of the denoising step. It has no gradient: the public function takes the reference where one is needed."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import library


@torch.library.register_fake("onepass::denoise_step", lib=library)
def _step(sample: Tensor, *args: Any, backend: str | None = None) -> Tensor:
    return torch.empty(sample.shape, dtype=sample.dtype, device=sample.device)
