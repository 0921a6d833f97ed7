"""Random numbers: rng.normal and rng.uniform beside PyTorch's generators.

A counter-based generator can be checked (against the reference, bit for bit); PyTorch's own draws other numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

import onepass
from onepass.reference import rng as reference

from .harness import COMPILED, Case

SEED = 1234


def cases(device: torch.device) -> Iterator[Case]:
    for distribution, theirs in (("normal", torch.randn), ("uniform", torch.rand)):
        for n, dtype in ((1 << 20, torch.float32), (1 << 20, torch.bfloat16), (1 << 24, torch.float32)):
            yield _case(device, distribution, theirs, n, dtype)


def _case(
    device: torch.device, distribution: str, theirs: Callable[..., torch.Tensor], n: int, dtype: torch.dtype
) -> Case:
    draw = getattr(onepass.rng, distribution)
    size = n * dtype.itemsize

    def make(device: torch.device) -> tuple:
        return (torch.empty(n, dtype=dtype, device=device),)

    def eager(out: torch.Tensor) -> torch.Tensor:
        return theirs(n, dtype=dtype, device=device, out=out)

    def truth(out: torch.Tensor) -> torch.Tensor:
        return reference.fill([n], distribution, SEED, None, 0, None, 0, None, torch.float32, device)

    return Case(
        op=f"rng.{distribution}",
        name=f"{distribution}_{n >> 20}m_{'bf16' if dtype.itemsize == 2 else 'fp32'}",
        shape=f"{n >> 20}M",
        dtype=dtype,
        make=make,
        implementations={
            "onepass": lambda out: draw([n], seed=SEED, dtype=dtype, device=device, out=out),
            "eager": eager,
        },
        compiled=lambda out: theirs(n, dtype=dtype, device=device),
        reference=truth,
        yardstick=lambda out: truth(out).to(dtype),
        uncompared=frozenset({"eager", COMPILED}),
        reads=0,
        writes=size,
        formula="writes n elements; integer and polynomial work is not counted",
        quick=n == 1 << 20,
    )
