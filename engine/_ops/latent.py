"""Fakes and gradient of posterior samples with options."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reference.latent import draws
from . import call, differentiable, library


def half_shape(mean: Tensor, logvar: Tensor | None, chunk_dim: int) -> list[Any]:
    shape = list(mean.shape)
    if logvar is None:
        shape[chunk_dim] = shape[chunk_dim] // 2
    return shape


def term_shapes(shape: list[Any], samples: int, terms: str) -> tuple[list[Any], list[Any]]:
    """Of what comes beside z."""
    rows = shape[0] if shape else 1
    if terms == "weights":
        return [max(samples, 1), rows], [max(samples, 1), rows]
    return {"none": [0], "row": [rows], "element": shape}[terms], [0]


@torch.library.register_fake("onepass::latent_sample", lib=library)
def _forward(mean: Tensor, logvar: Tensor | None, noise: Tensor | None, *args: Any, backend: str | None = None) -> Any:
    *_, chunk_dim, _low, _high, samples, _antithetic, terms, _beta, _free_bits = args
    shape = half_shape(mean, logvar, chunk_dim)
    dtype = torch.float64 if mean.dtype == torch.float64 else torch.float32
    beside = (torch.empty(x, dtype=dtype, device=mean.device) for x in term_shapes(shape, samples, terms))
    return mean.new_empty([samples, *shape] if samples else shape), *beside


@torch.library.register_fake("onepass::latent_sample_backward", lib=library)
def _backward(
    grad_z: Tensor | None, grad_first: Tensor | None, grad_second: Tensor | None, mean: Tensor, logvar: Tensor | None,
    noise: Tensor | None, *args: Any, backend: str | None = None,
) -> Any:
    *_, chunk_dim, _low, _high, samples, antithetic, _terms, _beta, _free_bits, noise_grad, prior_grad = args
    shape = half_shape(mean, logvar, chunk_dim)
    drawn = [draws(samples, antithetic), *shape] if samples else shape
    return (
        mean.new_empty(mean.shape), mean.new_empty(0 if logvar is None else shape),
        mean.new_empty(drawn if noise_grad else 0), mean.new_empty(shape if prior_grad else 0),
        mean.new_empty(shape if prior_grad else 0),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any) -> None:
    mean, logvar, noise, seed, seeds, stream, streams, offset, offsets, prior_mean, prior_logvar, *options = inputs
    ctx.save_for_backward(mean, logvar, noise, seeds, streams, offsets, prior_mean, prior_logvar)
    ctx.numbers = seed, stream, offset
    ctx.options = options
    ctx.backend = keyword_only_inputs["backend"]
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    mean, logvar, noise, seeds, streams, offsets, prior_mean, prior_logvar = ctx.saved_tensors
    seed, stream, offset = ctx.numbers
    terms = ctx.options[5]
    count = {"none": 1, "row": 2, "element": 2, "weights": 3}[terms]
    given = [grad if i < count else None for i, grad in enumerate(grads)]
    noise_grad = noise is not None and ctx.needs_input_grad[2]
    prior_grad = prior_mean is not None and (ctx.needs_input_grad[9] or ctx.needs_input_grad[10])
    grad_mean, grad_logvar, grad_noise, *on_prior = call(
        "latent_sample_backward",
        *given, mean, logvar, noise, seed, seeds, stream, streams, offset, offsets, prior_mean, prior_logvar,
        *ctx.options, noise_grad, prior_grad, backend=ctx.backend,
    )
    return (
        grad_mean, None if logvar is None else grad_logvar, grad_noise if noise_grad else None, *(None,) * 6,
        *(on_prior if prior_grad else (None, None)), *(None,) * len(ctx.options),
    )


differentiable("latent_sample", _save, _gradient)
