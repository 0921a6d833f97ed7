"""Reparameterized sampling on the CPU."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _C, DTYPES, by_rows, key_part, pointer


def _call(mean: Tensor, logvar: Tensor, noise: Tensor | None, keys: tuple[Any, ...]) -> tuple[Any, list[Tensor | None]]:
    """The kernel's description of a call, and the tensors that it points into."""
    rows = mean.shape[0] if mean.dim() else 1
    (mean, mean_step), (logvar, logvar_step) = by_rows(mean), by_rows(logvar)
    given, given_step = (None, 0) if noise is None else by_rows(noise)
    seed, seeds, stream, streams, offset, offsets = keys
    per_row = any(k is not None and k.dim() for k in (seeds, streams, offsets))
    call = _C.Reparam(
        rows, mean.numel() // rows if rows else 0, DTYPES[mean.dtype],
        (pointer(mean), mean_step), (pointer(logvar), logvar_step), (pointer(given), given_step),
        key_part(seed, seeds), key_part(stream, streams), key_part(offset, offsets), per_row, torch.get_num_threads(),
    )
    return call, [mean, logvar, given]


def forward(
    mean: Tensor, logvar: Tensor, noise: Tensor | None, *args: Any, out: tuple[Tensor | None, ...] | None = None
) -> tuple[Tensor, Tensor]:
    *keys, kl = args
    call, held = _call(mean, logvar, noise, tuple(keys))
    given = out[0] if out is not None else None
    direct = given is not None and given.is_contiguous()
    z = given if direct and given is not None else torch.empty(mean.shape, dtype=mean.dtype)
    rows = mean.shape[0] if mean.dim() else 1
    total = torch.zeros(rows if kl else 0)
    if mean.numel():
        tiles = -(-(mean.numel() // rows) // _C.KL_TILE)
        partial = torch.empty(rows * tiles, dtype=torch.float64) if kl else None
        _C.reparam_forward(call, z.data_ptr(), pointer(total) if kl else 0, pointer(partial))
    del held
    return (z if direct or given is None else given.copy_(z)), total


def backward(
    grad_z: Tensor | None, grad_kl: Tensor | None, mean: Tensor, logvar: Tensor, noise: Tensor | None, *args: Any,
    out: None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    *keys, noise_grad = args
    call, held = _call(mean, logvar, noise, tuple(keys))
    grad_mean = torch.empty(mean.shape, dtype=mean.dtype)
    grad_logvar = torch.empty(mean.shape, dtype=mean.dtype)
    grad_noise = torch.zeros(mean.shape if noise_grad else 0, dtype=mean.dtype)
    z, step = (None, 0) if grad_z is None else by_rows(grad_z)
    kl = None if grad_kl is None else grad_kl.contiguous()
    if mean.numel():
        _C.reparam_backward(
            call, (pointer(z), step), pointer(kl), grad_mean.data_ptr(), grad_logvar.data_ptr(),
            pointer(grad_noise) if noise_grad else 0,
        )
    del held
    return grad_mean, grad_logvar, grad_noise
