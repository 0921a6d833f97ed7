"""Rays that the tests of composite share, and what to ask of them."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import onepass

DEPTHS = ("expected", "normalized", "median")


def scene(
    n_rays: int, n_samples: int, channels: int, dtype: torch.dtype = torch.float64, seed: int = 0, alphas: bool = False
) -> list[Tensor]:
    """(density, features, t_starts, t_ends) of dense rays with gaps between samples."""
    g = torch.Generator().manual_seed(seed)
    edges = 1 + torch.rand(n_rays, 2 * n_samples, generator=g, dtype=torch.float64, device="cpu").cumsum(1)
    density = torch.rand(n_rays, n_samples, generator=g, dtype=torch.float64, device="cpu") * (1 if alphas else 3)
    features = torch.randn(n_rays, n_samples, channels, generator=g, dtype=torch.float64, device="cpu")
    rays = (density, features, edges[:, ::2].contiguous(), edges[:, 1::2].contiguous())
    return [x.to(torch.get_default_device(), dtype) for x in rays]


def render(
    density: Tensor, features: Tensor, t_starts: Tensor, t_ends: Tensor, alphas: bool = False, **options: Any
) -> onepass.Rendering:
    """composite, the density being opacities where `alphas` is set."""
    if alphas:
        return onepass.composite(None, features, t_starts, t_ends, alphas=density, **options)
    return onepass.composite(density, features, t_starts, t_ends, **options)


def ragged(n_rays: int, longest: int, seed: int = 0) -> Tensor:
    """ray_offsets of rays of 0 to `longest` samples."""
    counts = torch.randint(0, longest + 1, (n_rays,), generator=torch.Generator().manual_seed(seed), device="cpu")
    return torch.cat([torch.zeros(1, dtype=torch.int64), counts.to(torch.get_default_device()).cumsum(0)])


def leaves(rays: list[Tensor], n_rays: int, channels: int, shared: bool = True) -> list[Tensor]:
    """The rays with a background (one for all, or one a ray) and a prefix_trans, all asking for a gradient."""
    g = torch.Generator().manual_seed(5)
    back = torch.rand((channels,) if shared else (n_rays, channels), generator=g, dtype=torch.float64, device="cpu")
    prefix = 0.2 + 0.8 * torch.rand(n_rays, generator=g, dtype=torch.float64, device="cpu")
    return [x.detach().to(torch.get_default_device()).requires_grad_() for x in (*rays, back, prefix)]


def results(
    rays: list[Tensor], back: Tensor, prefix: Tensor, dtype: torch.dtype, backend: str, **options: Any
) -> dict[str, Tensor]:
    """Everything that composite returns and every gradient, computed in `dtype`, by name."""
    inputs = [x.detach().to(dtype).requires_grad_() for x in (*rays, back, prefix)]
    out = render(*inputs[:4], background=inputs[4], prefix_trans=inputs[5], backend=backend,
                 return_weights=True, distortion=True, **options)
    g = torch.Generator().manual_seed(9)
    with_grad = [x for x in out if x.requires_grad]
    grads = [torch.randn(x.shape, generator=g, dtype=torch.float64, device="cpu").to(x.device, dtype)
             for x in with_grad]
    found = torch.autograd.grad(with_grad, inputs, grads, allow_unused=True, materialize_grads=True)
    return dict(zip((*out._fields, "d_density", "d_features", "d_starts", "d_ends", "d_background", "d_prefix"),
                    (*out, *found), strict=True))
