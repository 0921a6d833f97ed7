"""Posterior samples with options on the CPU and on CUDA devices."""
from __future__ import annotations

import torch
from torch import Tensor

from .._ops.latent import half_shape, term_shapes
from ..reference.latent import TERMS, draws
from . import kernels, run


def forward(
    mean: Tensor, logvar: Tensor | None, noise: Tensor | None,
    seed: int, seeds: Tensor | None, stream: int, streams: Tensor | None, offset: int, offsets: Tensor | None,
    prior_mean: Tensor | None, prior_logvar: Tensor | None, chunk_dim: int, clamp_low: float, clamp_high: float,
    samples: int, antithetic: bool, terms: str, beta: float, free_bits: float,
    out: tuple[Tensor | None, ...] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = half_shape(mean, logvar, chunk_dim)
    given = out[0] if out is not None else None
    whole = [samples, *shape] if samples else shape
    z = given if given is not None and given.is_contiguous() else mean.new_empty(whole)
    first, second = (mean.new_empty(x, dtype=torch.float32) for x in term_shapes(shape, samples, terms))
    if z.numel():
        native, place = kernels(mean)
        run(
            native.latent_forward, mean, logvar, noise, (seed, seeds, stream, streams, offset, offsets), prior_mean,
            prior_logvar, chunk_dim, (clamp_low, clamp_high, samples, antithetic, TERMS.index(terms), beta, free_bits),
            z, first, second, place,
        )
    else:
        first.zero_(), second.zero_()
    return z if given is None or given is z else given.copy_(z), first, second


def backward(
    grad_z: Tensor | None, grad_first: Tensor | None, grad_second: Tensor | None,
    mean: Tensor, logvar: Tensor | None, noise: Tensor | None,
    seed: int, seeds: Tensor | None, stream: int, streams: Tensor | None, offset: int, offsets: Tensor | None,
    prior_mean: Tensor | None, prior_logvar: Tensor | None, chunk_dim: int, clamp_low: float, clamp_high: float,
    samples: int, antithetic: bool, terms: str, beta: float, free_bits: float,
    noise_grad: bool, prior_grad: bool, out: None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    shape = half_shape(mean, logvar, chunk_dim)
    grad_mean = mean.new_empty(mean.shape)
    grad_logvar = mean.new_empty(0 if logvar is None else shape)
    grad_noise = mean.new_zeros(([draws(samples, antithetic), *shape] if samples else shape) if noise_grad else 0)
    grad_prior = [mean.new_empty(shape if prior_grad else 0) for _ in range(2)]
    if grad_mean.numel():
        native, place = kernels(mean)
        first, second = (None if x is None else x.float() for x in (grad_first, grad_second))
        wanted = [x if x.numel() else None for x in (grad_logvar, *grad_prior, grad_noise)]
        run(
            native.latent_backward, mean, logvar, noise, (seed, seeds, stream, streams, offset, offsets), prior_mean,
            prior_logvar, chunk_dim, (clamp_low, clamp_high, samples, antithetic, TERMS.index(terms), beta, free_bits),
            grad_z, first, second, grad_mean, *wanted, place,
        )
    return grad_mean, grad_logvar, grad_noise, grad_prior[0], grad_prior[1]
