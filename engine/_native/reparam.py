"""Reparameterized sampling on the CPU and on CUDA devices."""
from __future__ import annotations

import torch
from torch import Tensor

from . import DTYPES, by_rows, empty_like, kernels, pointer, random_keys, row_length


def forward(
    mean: Tensor, logvar: Tensor, noise: Tensor | None,
    seed: int, seeds: Tensor | None, stream: int, streams: Tensor | None, offset: int, offsets: Tensor | None,
    kl: bool, out: tuple[Tensor | None, ...] | None = None,
) -> tuple[Tensor, Tensor]:
    rows, length = row_length(mean)
    given = out[0] if out is not None else None
    z = given if given is not None and given.is_contiguous() else empty_like(mean)
    total = mean.new_empty(rows if kl else 0, dtype=torch.float32)
    if z.numel():
        (m, m_step), (v, v_step) = by_rows(mean, length), by_rows(logvar, length)
        drawn, d_step, keys, per_row = None, 0, None, False
        if noise is not None:
            drawn, d_step = by_rows(noise, length)
        else:
            keys, per_row = random_keys(seed, seeds, stream, streams, offset, offsets)
        native, place = kernels(mean)
        partial = None
        if kl and length > native.KL_TILE:
            partial = mean.new_empty(rows * -(-length // native.KL_TILE), dtype=torch.float64)
        native.reparam_forward(
            rows, length, DTYPES[mean.dtype], m.data_ptr(), m_step, v.data_ptr(), v_step, pointer(drawn), d_step,
            keys, per_row, place, z.data_ptr(), total.data_ptr() if kl else 0, pointer(partial),
        )
    elif kl:
        total.zero_()
    return z if given is None or given is z else given.copy_(z), total


def backward(
    grad_z: Tensor | None, grad_kl: Tensor | None, mean: Tensor, logvar: Tensor, noise: Tensor | None,
    seed: int, seeds: Tensor | None, stream: int, streams: Tensor | None, offset: int, offsets: Tensor | None,
    noise_grad: bool, out: None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, length = row_length(mean)
    grad_mean, grad_logvar = empty_like(mean), empty_like(mean)
    grad_noise = empty_like(mean) if noise_grad else mean.new_empty(0)
    if grad_z is None:
        grad_noise.zero_()
    if mean.numel():
        (m, m_step), (v, v_step) = by_rows(mean, length), by_rows(logvar, length)
        z, z_step = (None, 0) if grad_z is None else by_rows(grad_z, length)
        drawn, d_step, keys, per_row = None, 0, None, False
        if noise is not None:
            drawn, d_step = by_rows(noise, length)
        else:
            keys, per_row = random_keys(seed, seeds, stream, streams, offset, offsets)
        on_kl = None if grad_kl is None else grad_kl.contiguous()
        native, place = kernels(mean)
        native.reparam_backward(
            rows, length, DTYPES[mean.dtype], m.data_ptr(), m_step, v.data_ptr(), v_step, pointer(drawn), d_step,
            keys, per_row, place, pointer(z), z_step, pointer(on_kl), grad_mean.data_ptr(),
            grad_logvar.data_ptr(), grad_noise.data_ptr() if noise_grad else 0,
        )
    return grad_mean, grad_logvar, grad_noise
