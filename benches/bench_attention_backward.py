"""A step of training through attention, forward and backward, causal: as many heads of keys as of queries, and groups.

SDPA is shown with enable_gqa, and on a GPU held to each of its fused kernels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import onepass

from .bench_attention import NAMES, _sdpa_gqa, _textbook
from .harness import Case
from .peers import sdpa_backends
from .timing import Run

STEPS = 1024
GOAL = ">= 75% of torch.mm's rate"


def cases(device: torch.device) -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        yield _case("train", dtype, device, heads=8, kv_heads=8, dim=64)
        yield _case("train_hd128", dtype, device, heads=8, kv_heads=2, dim=128)


def _case(
    kind: str, dtype: torch.dtype, device: torch.device, heads: int, kv_heads: int, dim: int, batch: int = 2
) -> Case:
    def make(device: torch.device) -> tuple:
        q, grad = (torch.randn(batch, STEPS, heads, dim, device=device).to(dtype) for _ in range(2))
        k, v = (torch.randn(batch, STEPS, kv_heads, dim, device=device).to(dtype) for _ in "kv")
        seen = torch.ones(STEPS, STEPS, dtype=torch.bool, device=device).tril()
        return *(x.requires_grad_() for x in (q, k, v)), seen, grad

    def step(attend: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, seen: Tensor, grad: Tensor) -> tuple:
        return torch.autograd.grad(attend(q, k, v, seen), (q, k, v), grad)

    def ours(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, backend: str | None = None) -> Any:
        return onepass.attention(q, k, v, causal=True, backend=backend)

    runs: dict[str, Run] = {"onepass": ours, "eager": _textbook, "SDPA": _sdpa_gqa, **sdpa_backends(device, _sdpa_gqa)}
    of_q, of_keys = batch * STEPS * heads * dim * dtype.itemsize, 2 * batch * STEPS * kv_heads * dim * dtype.itemsize
    return Case(
        op="attention_backward",
        name=f"{kind}_{NAMES[dtype]}",
        shape=f"B{batch} Q{STEPS} K{STEPS} H{heads}/{kv_heads} D{dim}",
        dtype=dtype,
        make=make,
        implementations={name: functools.partial(step, attend) for name, attend in runs.items()},
        reference=functools.partial(step, functools.partial(ours, backend="reference")),
        reads=4 * of_q + 2 * of_keys,
        writes=2 * of_q + of_keys,
        flops=7 * batch * heads * dim * STEPS * STEPS,
        formula="seven products, 2 D operations a query head and key each, causal half; each operand and result once",
        goal=GOAL,
    )
