"""Paths between latents beside PyTorch's: `torch.lerp`, and slerp as pipelines write it, eager and compiled."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import onepass

from .harness import Case

LATENTS = (64, 4, 64, 64)
WIDE = (8, 16, 128, 128)
GOAL = "within 1.25x of the time of the bytes"


def cases(device: torch.device) -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        yield _forward("slerp", LATENTS, dtype)
        yield _forward("slerp", WIDE, dtype)
        yield _forward("lerp", LATENTS, dtype)
    yield _with_gradient(LATENTS, torch.float32)


def _weights(weight: Tensor, like: Tensor) -> Tensor:
    return weight.reshape(-1, *(1,) * (like.dim() - 1)).to(like.dtype)


def _lerp(start: Tensor, end: Tensor, weight: Tensor) -> Tensor:
    return torch.lerp(start, end, _weights(weight, start))


def _slerp(start: Tensor, end: Tensor, weight: Tensor) -> Tensor:
    """The formula of diffusers' community pipelines, a latent a row."""
    t = _weights(weight, start)
    dims = list(range(1, start.dim()))
    length = lambda x: torch.linalg.vector_norm(x, dim=dims, keepdim=True)
    cosine = (start / length(start) * (end / length(end))).sum(dims, keepdim=True)
    angle = torch.acos(cosine.clamp(-1, 1))
    sine = torch.sin(angle)
    path = torch.sin((1 - t) * angle) / sine * start + torch.sin(t * angle) / sine * end
    return torch.where(cosine.abs() > 0.9995, torch.lerp(start, end, t.expand_as(start)), path)


def _reference(op: Callable[..., Tensor], start: Tensor, end: Tensor, weight: Tensor) -> Tensor:
    return op(start, end, weight, backend="reference")


def _gradient(path: Callable[..., Tensor], start: Tensor, end: Tensor, weight: Tensor, grad: Tensor) -> tuple:
    return torch.autograd.grad(path(start, end, weight), (start, end, weight), grad)


def _operands(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    start, end = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    return start, end, torch.linspace(0.1, 0.9, shape[0], device=device)


def _forward(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Case:
    own, eager = (onepass.slerp, _slerp) if name == "slerp" else (onepass.lerp, _lerp)
    size = math.prod(shape) * dtype.itemsize
    kind = "fp32" if dtype == torch.float32 else "bf16"
    return Case(
        op=name,
        name=f"{name}_{'wide_' if shape == WIDE else ''}{kind}",
        shape="x".join(map(str, shape)),
        dtype=dtype,
        make=functools.partial(_operands, shape, dtype),
        implementations={"onepass": own, "eager": eager},
        reference=functools.partial(_reference, own),
        reads=2 * size,
        writes=size,
        formula="reads both operands, writes the path; sums and angles are not counted as FLOPs",
        goal=GOAL,
    )


def _with_gradient(shape: tuple[int, ...], dtype: torch.dtype) -> Case:
    def make(device: torch.device) -> tuple:
        *leaves, grad = (*_operands(shape, dtype, device), torch.randn(shape, device=device).to(dtype))
        return *(x.requires_grad_() for x in leaves), grad

    size = math.prod(shape) * dtype.itemsize
    return Case(
        op="slerp",
        name="slerp_grad_fp32",
        shape="x".join(map(str, shape)),
        dtype=dtype,
        make=make,
        implementations={
            "onepass": functools.partial(_gradient, onepass.slerp),
            "eager": functools.partial(_gradient, _slerp),
        },
        reference=functools.partial(_gradient, functools.partial(_reference, onepass.slerp)),
        reads=5 * size,
        writes=3 * size,
        formula="forward 3 accesses an element, backward 5 (reads both operands and the gradient, writes two)",
        goal=GOAL,
    )
