"""Reparameterized sampling on the CPU and on CUDA devices."""
from __future__ import annotations

import torch
from torch import Tensor

from . import empty_like, kernels, run


def forward(
    mean: Tensor, logvar: Tensor, noise: Tensor | None,
    seed: int, seeds: Tensor | None, stream: int, streams: Tensor | None, offset: int, offsets: Tensor | None,
    kl: bool, out: tuple[Tensor | None, ...] | None = None,
) -> tuple[Tensor, Tensor]:
    given = out[0] if out is not None else None
    z = given if given is not None and given.is_contiguous() else empty_like(mean)
    total = mean.new_empty(0 if not kl else len(mean) if mean.dim() else 1, dtype=torch.float32)
    if z.numel():
        native, place = kernels(mean)
        key = seed, seeds, stream, streams, offset, offsets
        run(native.reparam_forward, mean, logvar, noise, key, z, total if kl else None, place)
    elif kl:
        total.zero_()
    return z if given is None or given is z else given.copy_(z), total


def backward(
    grad_z: Tensor | None, grad_kl: Tensor | None, mean: Tensor, logvar: Tensor, noise: Tensor | None,
    seed: int, seeds: Tensor | None, stream: int, streams: Tensor | None, offset: int, offsets: Tensor | None,
    noise_grad: bool, out: None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_mean, grad_logvar = empty_like(mean), empty_like(mean)
    grad_noise = empty_like(mean) if noise_grad else mean.new_empty(0)
    if grad_z is None:
        grad_noise.zero_()
    if mean.numel():
        native, place = kernels(mean)
        key = seed, seeds, stream, streams, offset, offsets
        run(native.reparam_backward, mean, logvar, noise, key, grad_z, grad_kl, grad_mean, grad_logvar,
            grad_noise if noise_grad else None, place)
    return grad_mean, grad_logvar, grad_noise
