"""Posterior samples with options on the CPU and on CUDA devices."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._ops.latent import half_shape, term_shapes
from ..reference.latent import TERMS, draws
from . import _C, DTYPES, kernels, layout_of, on_device, pointer, random_keys, row_length

_NOTHING = (0, 0, 0)


class _Operands:
    """Tensors of one shape [B, ...] with the segments that they share; what lies otherwise is copied.

    Keeps the tensors until the kernel has run.
    """

    def __init__(self, like: Tensor, *tensors: Tensor | None, result: Tensor | None = None) -> None:
        self.rows, self.length = row_length(like)
        runs = [layout[0] for x in tensors if x is not None and (layout := layout_of(x)) is not None]
        self.run = min(runs, default=self.length)
        if result is not None and (layout := layout_of(result)) is not None and layout[0] < self.length:
            self.run = layout[0]                # a result is written where it lies
        self.kept = list(tensors)

    def __call__(self, x: Tensor | None) -> tuple[int, int, int]:
        """(pointer, elements from row to row, and from segment to segment)"""
        if x is None:
            return _NOTHING
        layout = layout_of(x)
        if layout is None or layout[0] not in (self.run, self.length):
            x = x.contiguous()
            layout = self.length, self.length
        self.kept.append(x)
        return x.data_ptr(), x.stride(0) if x.dim() else 0, self.run if layout[0] == self.length else layout[1]


def _halves(mean: Tensor, logvar: Tensor | None, chunk_dim: int) -> tuple[Tensor, Tensor]:
    if logvar is not None:
        return mean, logvar
    half = mean.shape[chunk_dim] // 2
    return mean.narrow(chunk_dim, 0, half), mean.narrow(chunk_dim, half, half)


def _call(
    at: _Operands, mean: Tensor, logvar: Tensor, noise: Tensor | None, keys: tuple[Any, ...],
    prior_mean: Tensor | None, prior_logvar: Tensor | None, chunk_dim: int, clamp_low: float, clamp_high: float,
    samples: int, antithetic: bool, terms: str, beta: float, free_bits: float,
) -> tuple[Any, Any, tuple[Any, ...]]:
    """The kernels of mean's device, the call as they take it, and what they take after everything else."""
    drawn, step = None, 0
    if noise is not None:
        drawn = noise[0] if samples else noise
        step = noise.stride(0) if samples else 0
    named, per_row = (None, False) if noise is not None else random_keys(*keys)
    native, place = kernels(mean)
    threads, target = (1, (place,)) if on_device(mean) else (place, ())
    call = _C.Latent(
        at.rows, at.length // at.run, at.run, DTYPES[mean.dtype], at(mean), at(logvar), at(prior_mean),
        at(prior_logvar), at(drawn), step, named, per_row, clamp_low, clamp_high, max(samples, 1), antithetic,
        TERMS.index(terms), beta, free_bits, threads,
    )
    return native, call, target


def _whole(x: Tensor | None, samples: int) -> Tensor | None:
    """Given samples whose rows the kernel can read one by one: a copy where they are not contiguous."""
    return x.contiguous() if x is not None and samples else x


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
        mean, logvar = _halves(mean, logvar, chunk_dim)
        noise = _whole(noise, samples)
        drawn = noise[0] if noise is not None and samples else noise
        at = _Operands(mean, mean, logvar, prior_mean, prior_logvar, drawn)
        partial = None
        if terms in ("row", "weights") and at.length > _C.LATENT_TILE:
            planes = 1 if terms == "row" else 2 * max(samples, 1)
            partial = mean.new_empty(planes * at.rows * -(-at.length // _C.LATENT_TILE), dtype=torch.float64)
        keys = seed, seeds, stream, streams, offset, offsets
        native, call, target = _call(
            at, mean, logvar, noise, keys, prior_mean, prior_logvar, chunk_dim, clamp_low, clamp_high, samples,
            antithetic, terms, beta, free_bits,
        )
        native.latent_forward(call, z.data_ptr(), pointer(first if first.numel() else None),
                              pointer(second if second.numel() else None), pointer(partial), *target)
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
        on_mean, on_logvar = _halves(grad_mean, None if logvar is None else grad_logvar, chunk_dim)
        mean, logvar = _halves(mean, logvar, chunk_dim)
        noise, grad_z = _whole(noise, samples), _whole(grad_z, samples)
        drawn = noise[0] if noise is not None and samples else noise
        on_z = grad_z[0] if grad_z is not None and samples else grad_z
        at = _Operands(mean, mean, logvar, prior_mean, prior_logvar, drawn, on_z, result=on_mean)
        keys = seed, seeds, stream, streams, offset, offsets
        native, call, target = _call(
            at, mean, logvar, noise, keys, prior_mean, prior_logvar, chunk_dim, clamp_low, clamp_high, samples,
            antithetic, terms, beta, free_bits,
        )
        first, second = (None if x is None else x.float().contiguous() for x in (grad_first, grad_second))
        on_pm, on_plv = (at(x if prior_grad else None) for x in grad_prior)
        step = grad_z.stride(0) if grad_z is not None and samples else 0
        native.latent_backward(call, at(on_z), step, pointer(first), pointer(second), at(on_mean), at(on_logvar),
                               on_pm, on_plv, pointer(grad_noise if noise_grad else None), *target)
    return grad_mean, grad_logvar, grad_noise, grad_prior[0], grad_prior[1]
