"""The Gumbel softmax beside PyTorch's, and its gradient: rows of logits, a draw of a category each.

PyTorch draws other numbers, so its values differ by design; ours are held to the reference with our own noise.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

import onepass
from onepass.gumbel import STREAM_TAG

from .harness import COMPILED, Case
from .timing import Run

SEED = 7
ROWS, CATEGORIES = 8192, 1024
TAU = 0.7


def cases(device: torch.device) -> Iterator[Case]:
    yield _forward(torch.float32)
    yield _forward(torch.bfloat16)
    yield _with_gradient(torch.float32)


def _ours(logits: Tensor) -> Tensor:
    return onepass.gumbel_softmax(logits, TAU, seed=SEED)


def _eager(logits: Tensor) -> Tensor:
    return F.gumbel_softmax(logits, TAU)


def _reference(logits: Tensor) -> Tensor:
    return onepass.gumbel_softmax(logits, TAU, seed=SEED, backend="reference")


def _same_noise(logits: Tensor) -> Tensor:
    noise = onepass.rng.gumbel(
        logits.shape, seed=SEED, stream=STREAM_TAG << 56, device=logits.device, backend="reference"
    )
    return torch.softmax((logits + noise.to(logits.dtype)) / TAU, -1)


def _gradient(sample: Run, logits: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(sample(logits), logits, grad)


def _forward(dtype: torch.dtype) -> Case:
    size = ROWS * CATEGORIES * dtype.itemsize
    return Case(
        op="gumbel_softmax",
        name="gumbel_fp32" if dtype == torch.float32 else "gumbel_bf16",
        shape=f"{ROWS}x{CATEGORIES}",
        dtype=dtype,
        make=lambda device: (torch.randn(ROWS, CATEGORIES, device=device).to(dtype),),
        implementations={"onepass": _ours, "eager": _eager},
        reference=_reference,
        yardstick=_same_noise,
        uncompared=frozenset({"eager", COMPILED}),
        reads=size,
        writes=size,
        formula="reads logits, writes the sample; drawing, logarithms and exponentials are not counted as FLOPs",
    )


def _with_gradient(dtype: torch.dtype) -> Case:
    def make(device: torch.device) -> tuple:
        logits, grad = (torch.randn(ROWS, CATEGORIES, device=device).to(dtype) for _ in range(2))
        return logits.requires_grad_(), grad

    size = ROWS * CATEGORIES * dtype.itemsize
    return Case(
        op="gumbel_softmax",
        name="gumbel_grad_fp32",
        shape=f"{ROWS}x{CATEGORIES}",
        dtype=dtype,
        make=make,
        implementations={
            "onepass": functools.partial(_gradient, _ours),
            "eager": functools.partial(_gradient, _eager),
        },
        reference=functools.partial(_gradient, _reference),
        yardstick=functools.partial(_gradient, _same_noise),
        uncompared=frozenset({"eager", COMPILED}),
        reads=3 * size,
        writes=2 * size,
        formula="forward 2 accesses an element, backward 3 (reads logits and the gradient, writes one)",
    )
