"""Compositing: colors, depth and opacity of rays, and the gradients to densities and colors.

Stock code is the usual NeRF recipe: densities to weights by a cumulative sum, then weighted sums.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import onepass
from onepass.reference import volrend as reference

from .harness import Case

SHAPES = ((4096, 128), (65536, 64))
Render = Callable[..., tuple[Tensor, ...]]


def cases(device: torch.device) -> Iterator[Case]:
    for n_rays, n_samples in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            yield _case(n_rays, n_samples, dtype, gradients=False)
            yield _case(n_rays, n_samples, dtype, gradients=True)


def _stock(sigmas: Tensor, colors: Tensor, t_starts: Tensor, t_ends: Tensor, background: Tensor) -> tuple[Tensor, ...]:
    tau = sigmas * (t_ends - t_starts)
    through = torch.cumsum(tau, -1)
    weights = torch.exp(tau - through) * -torch.expm1(-tau)
    opacity = weights.sum(-1)
    color = (weights[..., None] * colors).sum(-2) + (1 - opacity)[:, None] * background
    return color, (weights * (t_starts + t_ends) / 2).sum(-1), opacity


def _ours(sigmas: Tensor, colors: Tensor, t_starts: Tensor, t_ends: Tensor, background: Tensor) -> tuple[Tensor, ...]:
    return tuple(onepass.composite(sigmas, colors, t_starts, t_ends, background=background)[:3])


def _reference(
    sigmas: Tensor, colors: Tensor, t_starts: Tensor, t_ends: Tensor, background: Tensor
) -> tuple[Tensor, ...]:
    return reference.composite(
        sigmas, colors, t_starts, t_ends, None, None, background, None, 0.0, "expected", False, False
    )[:3]


def _gradients(render: Render, *args: Tensor) -> tuple[Tensor, ...]:
    *rays, on_color, on_depth, on_opacity = args
    outputs = render(*rays)
    grads = [g.to(x.dtype) for g, x in zip((on_color, on_depth, on_opacity), outputs, strict=True)]
    return torch.autograd.grad(outputs, rays[:2], grads)


def _case(n_rays: int, n_samples: int, dtype: torch.dtype, gradients: bool) -> Case:
    def make(device: torch.device) -> tuple:
        edges = torch.linspace(2, 6, n_samples + 1, device=device) + torch.rand(n_rays, 1, device=device)
        sigmas = torch.rand(n_rays, n_samples, device=device) * 2
        colors = torch.rand(n_rays, n_samples, 3, device=device)
        rays = (sigmas.to(dtype), colors.to(dtype), edges[:, :-1].contiguous(), edges[:, 1:].contiguous())
        if not gradients:
            return *rays, torch.rand(3, device=device).to(dtype)
        grads = [torch.randn(shape, device=device) for shape in ((n_rays, 3), (n_rays,), (n_rays,))]
        background = torch.rand(3, device=device).to(dtype)
        return rays[0].requires_grad_(), rays[1].requires_grad_(), *rays[2:], background, *grads

    wrap = (lambda f: functools.partial(_gradients, f)) if gradients else (lambda f: f)
    samples, size = n_rays * n_samples, dtype.itemsize
    inputs, written = samples * (4 * size + 8), samples * 4 * size
    return Case(
        op="composite",
        name=f"{'grad' if gradients else 'rgb'}_r{n_rays}x{n_samples}_{'fp32' if dtype is torch.float32 else 'bf16'}",
        shape=f"{n_rays} rays x {n_samples}, rgb",
        dtype=dtype,
        make=make,
        implementations={"onepass": wrap(_ours), "eager": wrap(_stock)},
        reference=wrap(_reference),
        yardstick=wrap(_reference),
        reads=inputs * (2 if gradients else 1),
        writes=written if gradients else n_rays * (3 * size + 8),
        formula="a sample: density and 3 colors in the row's dtype, 2 float32 times; "
        + ("read twice, gradients to densities and colors written" if gradients else "read once"),
        quick=n_rays == SHAPES[0][0] and dtype is torch.float32,
    )
