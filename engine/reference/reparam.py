"""Reparameterized sampling: z = mean + exp(logvar / 2) eps, eps ~ N(0, 1), and KL(N(mean, exp(logvar)) || N(0, 1)).

Kingma and Welling, "Auto-encoding variational Bayes", 2014, equations 10 and appendix B.
"""
import torch
from torch import Tensor

from . import rng


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _noise(
    mean: Tensor, noise: Tensor | None,
    seed: int, seeds: Tensor | None, stream: int, streams: Tensor | None, offset: int, offsets: Tensor | None,
) -> Tensor:
    if noise is not None:
        return _wide(noise)
    drawn = rng.fill(
        list(mean.shape), "normal", seed, seeds, stream, streams, offset, offsets, torch.float32, mean.device
    )
    return drawn.to(_wide(mean).dtype)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(x.shape[0] if x.dim() else 1, -1) if x.numel() else x.new_zeros(x.shape[0] if x.dim() else 1, 0)


def reparameterize(
    mean: Tensor,                               # [B, ...]
    logvar: Tensor,                             # as mean
    noise: Tensor | None,                       # as mean; None draws it
    seed: int, seeds: Tensor | None,            # the key, as in rng.fill
    stream: int, streams: Tensor | None,
    offset: int, offsets: Tensor | None,
    kl: bool,
) -> tuple[Tensor, Tensor]:                     # z as mean; KL of each row [B], or [0]
    eps = _noise(mean, noise, seed, seeds, stream, streams, offset, offsets)
    m, lv = _wide(mean), _wide(logvar)
    z = (m + torch.exp(0.5 * lv) * eps).to(mean.dtype).contiguous()
    if not kl:
        return z, m.new_empty(0)
    return z, 0.5 * _rows(lv.exp() + m * m - 1.0 - lv).sum(1)


def reparameterize_backward(
    grad_z: Tensor | None,                      # as mean
    grad_kl: Tensor | None,                     # [B]
    mean: Tensor,
    logvar: Tensor,
    noise: Tensor | None,
    seed: int, seeds: Tensor | None,
    stream: int, streams: Tensor | None,
    offset: int, offsets: Tensor | None,
    noise_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:             # as mean, twice; as mean or [0]
    m, lv = _wide(mean), _wide(logvar)
    std = torch.exp(0.5 * lv)
    grad_mean, grad_logvar, grad_noise = torch.zeros_like(m), torch.zeros_like(m), torch.zeros_like(m)
    if grad_z is not None:
        dz = _wide(grad_z)
        grad_mean = dz
        grad_noise = dz * std
        grad_logvar = 0.5 * grad_noise * _noise(mean, noise, seed, seeds, stream, streams, offset, offsets)
    if grad_kl is not None:
        dkl = grad_kl.to(m.dtype).reshape(-1, *(1,) * (m.dim() - 1)) if m.dim() else grad_kl.to(m.dtype).reshape(())
        grad_mean = grad_mean + dkl * m
        grad_logvar = grad_logvar + 0.5 * dkl * (std * std - 1.0)
    narrow = lambda x: x.to(mean.dtype).clone(memory_format=torch.contiguous_format)
    return narrow(grad_mean), narrow(grad_logvar), narrow(grad_noise) if noise_grad else mean.new_zeros(0)
