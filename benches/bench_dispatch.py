"""What a call costs before any work: 64 numbers through each path of `onepass`, beside PyTorch's own.

The direct path is what plain tensors take; the dispatcher's is taken under torch.compile, functorch, modes and
subclasses; autograd's where a gradient is needed. The work itself is a few nanoseconds.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

import onepass
from onepass.reference import rng as rng_reference

from .harness import COMPILED, Case

N = 64
SIZE = 4 * N


def cases(device: torch.device) -> Iterator[Case]:
    yield Case(
        op="reparameterize",
        name="call_reparameterize",
        shape=str(N),
        dtype=torch.float32,
        make=_make,
        implementations={
            "onepass direct": lambda mean, logvar, noise, leaf: onepass.reparameterize(mean, logvar, noise=noise),
            "onepass dispatcher": _dispatched,
            "onepass autograd": lambda mean, logvar, noise, leaf: onepass.reparameterize(leaf, logvar, noise=noise),
            "eager": _eager,
            "eager autograd": lambda mean, logvar, noise, leaf: _eager(leaf, logvar, noise, leaf),
        },
        reference=_eager,
        reads=3 * SIZE,
        writes=SIZE,
        formula="reads mean, logvar, noise, writes z; the time is the call's own",
    )
    yield Case(
        op="rng.normal",
        name="call_rng_normal",
        shape=str(N),
        dtype=torch.float32,
        make=lambda device: (torch.empty(N, device=device),),
        implementations={
            "onepass direct": lambda like: onepass.rng.normal([N], seed=1, device=like.device),
            "onepass dispatcher": lambda like: torch.ops.onepass.rng_fill(
                [N], "normal", 1, None, 0, None, 0, None, torch.float32, like.device
            ),
            "eager": lambda like: torch.randn(N, device=like.device),
        },
        reference=_normals,
        yardstick=_normals,
        uncompared=frozenset({"eager", COMPILED}),
        reads=0,
        writes=SIZE,
        formula="writes the numbers; the time is the call's own",
    )


def _make(device: torch.device) -> tuple[Tensor, ...]:
    mean, logvar, noise = torch.randn(3, N, device=device)
    return mean.clone(), logvar.clone(), noise.clone(), mean.clone().requires_grad_()


def _dispatched(mean: Tensor, logvar: Tensor, noise: Tensor, leaf: Tensor) -> Tensor:
    return torch.ops.onepass.reparameterize(mean, logvar, noise, 0, None, 0, None, 0, None, False)[0]


def _eager(mean: Tensor, logvar: Tensor, noise: Tensor, leaf: Tensor) -> Tensor:
    return mean + torch.exp(0.5 * logvar) * noise


def _normals(like: Tensor) -> Tensor:
    return rng_reference.fill([N], "normal", 1, None, 0, None, 0, None, torch.float32, like.device)
