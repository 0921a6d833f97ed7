"""The streams of torch.randn and torch.rand on a CUDA device of a given size, remade on any machine."""
from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .reference import torch_cuda as reference

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _fill(
    distribution: str, shape: Sequence[int], seed: int, offset: int, sm_count: int, max_threads_per_sm: int,
    dtype: torch.dtype, device: torch.device | str | None,
) -> Tensor:
    sizes = [shape] if isinstance(shape, int) else list(shape)
    for name, value, least in (
        *(("shape", size, 0) for size in sizes), ("offset", offset, 0), ("sm_count", sm_count, 1),
        ("max_threads_per_sm", max_threads_per_sm, reference.BLOCK),
    ):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} is {type(value).__name__}, expected an int")
        if value < least:
            raise ValueError(f"{name}={value}: expected at least {least}")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed is {type(seed).__name__}, expected an int")
    if offset % 4:
        raise ValueError(f"offset={offset}: expected a multiple of 4, as torch's generators have")
    if dtype not in _DTYPES:
        raise TypeError(f"dtype={dtype}: expected float32, bfloat16 or float16")
    drawn = reference.fill(math.prod(sizes), distribution, seed, offset, sm_count, max_threads_per_sm, dtype)
    return drawn.reshape(sizes).to(device or "cpu")


def torch_cuda_normal(
    shape: Sequence[int],
    seed: int,                              # of the generator: torch.cuda.initial_seed()
    offset: int,                            # of the generator: bytes 8 to 16 of its state; 0 after manual_seed
    sm_count: int,                          # of the device: multi_processor_count (T4 40, A100 108, H200 132)
    max_threads_per_sm: int = 2048,         # of the device: max_threads_per_multi_processor (T4 1024)
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """What `torch.randn(shape, device="cuda")` gives on a GPU of that size, remade on any machine.

    The words and their places are the device's to the bit. A value may differ in its last digits, by what the device's
    fast sine and cosine are off.
    """
    return _fill("normal", shape, seed, offset, sm_count, max_threads_per_sm, dtype, device)


def torch_cuda_uniform(
    shape: Sequence[int], seed: int, offset: int, sm_count: int, max_threads_per_sm: int = 2048, *,
    dtype: torch.dtype = torch.float32, device: torch.device | str | None = None,
) -> Tensor:
    """What `torch.rand(shape, device="cuda")` gives on a GPU of that size, to the bit; see `torch_cuda_normal`."""
    return _fill("uniform", shape, seed, offset, sm_count, max_threads_per_sm, dtype, device)


def torch_cuda_offset_after(n: int, sm_count: int, max_threads_per_sm: int = 2048) -> int:
    """By how much drawing n elements moves the generator's offset: where the next tensor begins."""
    return reference.offset_after(n, sm_count, max_threads_per_sm)
