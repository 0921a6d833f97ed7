"""Fakes and gradient of compositing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import call, differentiable, library


@torch.library.register_fake("onepass::composite", lib=library)
def _forward(
    sigmas: Tensor | None, features: Tensor, t_starts: Tensor, t_ends: Tensor, alphas: Tensor | None,
    ray_offsets: Tensor | None, background: Tensor | None, prefix_trans: Tensor | None, early_stop_eps: float,
    depth: str, return_weights: bool, distortion: bool, *, backend: str | None = None,
) -> tuple[Tensor, ...]:
    density = alphas if sigmas is None else sigmas
    assert density is not None
    n_rays = density.shape[0] if ray_offsets is None else ray_offsets.shape[0] - 1
    return (
        features.new_empty(n_rays, features.shape[-1]),
        t_starts.new_empty(n_rays),
        density.new_empty(n_rays),
        torch.empty(density.shape if return_weights else 0, dtype=density.dtype, device=density.device),
        t_starts.new_empty(n_rays if distortion else 0),
    )


@torch.library.register_fake("onepass::composite_backward", lib=library)
def _backward(*args: Any, backend: str | None = None) -> tuple[Tensor, ...]:
    sigmas, features, t_starts, t_ends, alphas, _, background, prefix_trans = args[5:13]
    inputs = (sigmas, features, t_starts, t_ends, alphas, background, prefix_trans)
    absent = torch.empty(0, dtype=torch.float32, device=features.device)
    return tuple(
        torch.empty(x.shape, dtype=x.dtype, device=x.device) if need and x is not None else absent.clone()
        for x, need in zip(inputs, args[-1], strict=True)
    )


def _save(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any) -> None:
    *tensors, ctx.early_stop_eps, ctx.depth, ctx.return_weights, ctx.distortion = inputs
    ctx.save_for_backward(*tensors)
    ctx.backend = keyword_only_inputs["backend"]
    ctx.set_materialize_grads(False)


def _gradient(
    ctx: Any, features: Tensor | None, depth: Tensor | None, opacity: Tensor | None, weights: Tensor | None,
    distortion: Tensor | None,
) -> tuple[Tensor | None, ...]:
    slots = (0, 1, 2, 3, 4, 6, 7)  # of the inputs: all but ray_offsets
    needs = [ctx.needs_input_grad[i] for i in slots]
    grads = call(
        "composite_backward",
        features, depth, opacity, weights if ctx.return_weights else None, distortion if ctx.distortion else None,
        *ctx.saved_tensors, ctx.early_stop_eps, ctx.depth, needs, backend=ctx.backend,
    )
    result: list[Tensor | None] = [None] * 12
    for slot, need, grad in zip(slots, needs, grads, strict=True):
        result[slot] = grad if need else None
    return tuple(result)


differentiable("composite", _save, _gradient)
