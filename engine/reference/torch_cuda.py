"""What torch.randn and torch.rand give on a CUDA device, remade anywhere.

Those kernels launch blocks of 256 threads, as many as the device holds at a time; each thread has a Philox4x32-10
subsequence of its own and its four numbers go to places a whole grid apart, so that the result depends on the device's
size. Layout: counter (offset / 4 + turn, thread), key seed, cuRAND's transforms.
"""
import math

import torch
from torch import Tensor

from . import rng

BLOCK = 256
_CHUNK = 1 << 20        # numbers drawn at a time: int64 words take sixteen bytes a number and more


def grid_threads(n: int, sm_count: int, max_threads_per_sm: int) -> int:
    """The threads that a fill of n elements launches."""
    return min(-(-n // BLOCK), sm_count * (max_threads_per_sm // BLOCK)) * BLOCK


def offset_after(n: int, sm_count: int, max_threads_per_sm: int) -> int:
    """By how much a fill of n elements moves the generator's offset."""
    return 4 * ((n - 1) // (4 * grid_threads(n, sm_count, max_threads_per_sm)) + 1) if n else 0


def _words(turn: int, first: int, count: int, seed: int, offset: int) -> tuple[Tensor, ...]:
    """The four words of threads first .. first + count in one turn of the grid."""
    thread = torch.arange(first, first + count)
    block = torch.full_like(thread, ((offset // 4 + turn + 2**63) % 2**64) - 2**63)
    key = torch.full_like(thread, (seed + 2**63) % 2**64 - 2**63)
    halves = lambda x: (x & 0xFFFFFFFF, (x >> 32) & 0xFFFFFFFF)
    return rng.philox((*halves(block), *halves(thread)), halves(key))


def _uniform(words: tuple[Tensor, ...]) -> list[Tensor]:
    """cuRAND's, in (0, 1]."""
    return [word.to(torch.float32) * 2.0**-32 + 2.0**-33 for word in words]


def _normal(words: tuple[Tensor, ...]) -> list[Tensor]:
    """cuRAND's Box-Muller: the sine first."""
    results = []
    u = _uniform(words)
    for size, turn in (u[:2], u[2:]):
        radius = (-2.0 * rng.ln(size)).double().sqrt().float()
        sin, cos = rng.sincos_turn(turn)
        results += [radius * sin, radius * cos]
    return results


def fill(
    n: int, distribution: str, seed: int, offset: int, sm_count: int, max_threads_per_sm: int, dtype: torch.dtype
) -> Tensor:                # [n]
    out = torch.empty(n, dtype=dtype)
    if not n:
        return out
    grid = grid_threads(n, sm_count, max_threads_per_sm)
    transform = {"uniform": _uniform, "normal": _normal}[distribution]
    for turn in range(math.ceil(n / (4 * grid))):
        begin = 4 * grid * turn
        for first in range(0, min(grid, n - begin), _CHUNK):
            count = min(_CHUNK, grid - first)
            for i, x in enumerate(transform(_words(turn, first, count, seed, offset))):
                at = begin + i * grid + first
                out[at : at + count] = x[: max(0, n - at)].to(dtype)
    if distribution == "uniform":       # torch turns (0, 1] into [0, 1) after it has rounded
        out.masked_fill_(out == 1.0, 0.0)
    return out
