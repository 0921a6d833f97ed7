"""Samples of a diagonal Gaussian posterior with everything that a variational autoencoder asks of them.

z_k = mean + exp(logvar / 2) eps_k, and one of: the KL divergence to a diagonal Gaussian prior (Kingma and Welling,
"Auto-encoding variational Bayes", 2014), weighted (Higgins et al., "beta-VAE", 2017) and held above a floor (free bits:
Kingma et al., "Improved variational inference with inverse autoregressive flow", 2016); or the terms of importance
weights, log q(z_k | x) and log p(z_k) (Burda et al., "Importance weighted autoencoders", 2016).
"""
import math

import torch
from torch import Tensor

from . import rng
from .reparam import _rows, _wide

SAMPLE_STEP = 2**40         # blocks of random numbers between one sample of a row and the next
TERMS = ("none", "row", "element", "weights")


def halves(mean: Tensor, logvar: Tensor | None, chunk_dim: int) -> tuple[Tensor, Tensor]:
    if logvar is not None:
        return mean, logvar
    first, second = mean.chunk(2, chunk_dim)
    return first, second


def draws(samples: int, antithetic: bool) -> int:
    """How often noise is drawn."""
    return max(samples, 1) // (2 if antithetic else 1)


def _noise(
    mean: Tensor, noise: Tensor | None,
    seed: int, seeds: Tensor | None, stream: int, streams: Tensor | None, offset: int, offsets: Tensor | None,
    samples: int, antithetic: bool,
) -> Tensor:                                    # [max(samples, 1), *mean.shape], of antithetic pairs the second negated
    count = draws(samples, antithetic)
    if noise is not None:
        drawn = _wide(noise).reshape(count, *mean.shape)
    else:
        offsets = rng.as_key(offset, offsets, mean.device)
        drawn = torch.stack([
            rng.fill(list(mean.shape), "normal", seed, seeds, stream, streams, 0, offsets + i * SAMPLE_STEP,
                     torch.float32, mean.device)
            for i in range(count)
        ]).to(_wide(mean).dtype)
    return torch.stack((drawn, -drawn), 1).flatten(0, 1) if antithetic else drawn


def _kl_elements(m: Tensor, lv: Tensor, prior_mean: Tensor | None, prior_logvar: Tensor | None) -> Tensor:
    if prior_mean is None or prior_logvar is None:
        return 0.5 * (lv.exp() + m * m - 1.0 - lv)
    pm, plv = _wide(prior_mean), _wide(prior_logvar)
    return 0.5 * ((lv - plv).exp() + (m - pm).square() * (-plv).exp() - 1.0 + plv - lv)


def _log_density(scaled: Tensor, logvar: Tensor) -> Tensor:
    """Of a diagonal Gaussian, [K, B], where the squared distance from its mean over its variance is `scaled`."""
    terms = scaled + logvar + math.log(2 * math.pi)
    return -0.5 * torch.stack([_rows(x).sum(1) for x in terms])


def latent_sample(
    mean: Tensor,                               # [B, ...]; without logvar both of them, chunks in chunk_dim
    logvar: Tensor | None,                      # as mean
    noise: Tensor | None,                       # [draws, *mean.shape], or mean.shape without samples; None draws it
    seed: int, seeds: Tensor | None,            # the key, as in rng.fill; sample k begins k * SAMPLE_STEP blocks later
    stream: int, streams: Tensor | None,
    offset: int, offsets: Tensor | None,
    prior_mean: Tensor | None,                  # as mean, both or neither: the standard normal
    prior_logvar: Tensor | None,
    chunk_dim: int,
    clamp_low: float,                           # logvar is clamped to [clamp_low, clamp_high] first
    clamp_high: float,
    samples: int,                               # 0: one, without a dim of its own
    antithetic: bool,                           # sample 2 i + 1 has the noise of sample 2 i, negated
    terms: str,                                 # one of TERMS
    beta: float,                                # the KL's factor
    free_bits: float,                           # an element's KL counts as this at least
) -> tuple[Tensor, Tensor, Tensor]:             # z; KL [B] or mean.shape, or log q [K, B]; log p [K, B]
    mean, logvar = halves(mean, logvar, chunk_dim)
    key = seed, seeds, stream, streams, offset, offsets
    m, lv = _wide(mean), _wide(logvar).clamp(clamp_low, clamp_high)
    eps = _noise(mean, noise, *key, samples, antithetic)
    z = m + torch.exp(0.5 * lv) * eps
    narrow = (z if samples else z[0]).to(mean.dtype).contiguous()
    if terms == "none":
        return narrow, m.new_empty(0), m.new_empty(0)
    if terms == "weights":
        scaled, spread = z.square(), torch.zeros_like(m)
        if prior_mean is not None and prior_logvar is not None:
            spread = _wide(prior_logvar)
            scaled = (z - _wide(prior_mean)).square() * (-spread).exp()
        return narrow, _log_density(eps.square(), lv), _log_density(scaled, spread)
    kl = _kl_elements(m, lv, prior_mean, prior_logvar).clamp_min(free_bits)
    return narrow, beta * (_rows(kl).sum(1) if terms == "row" else kl.contiguous()), m.new_empty(0)


def _beside(rows: Tensor, like: Tensor) -> Tensor:
    """[..., B] as [..., B, 1, ...]: one number beside each element of a row."""
    return rows.to(like.dtype).reshape(*rows.shape[:-1], *like.shape[:1], *(1,) * (like.dim() - 1))


def latent_sample_backward(
    grad_z: Tensor | None,                      # as z
    grad_first: Tensor | None,                  # as the second result: of the KL or of log q
    grad_second: Tensor | None,                 # of log p
    mean: Tensor, logvar: Tensor | None, noise: Tensor | None,
    seed: int, seeds: Tensor | None, stream: int, streams: Tensor | None, offset: int, offsets: Tensor | None,
    prior_mean: Tensor | None, prior_logvar: Tensor | None,
    chunk_dim: int, clamp_low: float, clamp_high: float, samples: int, antithetic: bool, terms: str, beta: float,
    free_bits: float,
    noise_grad: bool,
    prior_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:     # of mean, logvar, noise and the prior; [0] where none
    parameters, chunked = mean, logvar is None
    mean, logvar = halves(mean, logvar, chunk_dim)
    m, unclamped = _wide(mean), _wide(logvar)
    lv = unclamped.clamp(clamp_low, clamp_high)
    std = torch.exp(0.5 * lv)
    pm, plv = (torch.zeros_like(m) if x is None else _wide(x) for x in (prior_mean, prior_logvar))
    precision = (-plv).exp()
    dm, dlv, dpm, dplv = (torch.zeros_like(m) for _ in range(4))
    dnoise = m.new_zeros(max(samples, 1), *m.shape)
    weighted = terms == "weights" and (grad_first is not None or grad_second is not None)
    if grad_z is not None or weighted:
        eps = _noise(mean, noise, seed, seeds, stream, streams, offset, offsets, samples, antithetic)
        dz = torch.zeros_like(eps) if grad_z is None else _wide(grad_z).reshape(eps.shape)
        if weighted and grad_second is not None:
            dp, away = _beside(grad_second, m), m + std * eps - pm
            pull = dp * away * precision
            dz = dz - pull
            dpm = pull.sum(0)
            dplv = 0.5 * (pull * away - dp).sum(0)
        dm = dz.sum(0)
        dlv = 0.5 * std * (dz * eps).sum(0)
        dnoise = dz * std
        if weighted and grad_first is not None:
            dq = _beside(grad_first, m)
            dlv = dlv - 0.5 * dq.sum(0)
            dnoise = dnoise - dq * eps
    if grad_first is not None and terms in ("row", "element"):
        elements = _kl_elements(m, lv, prior_mean, prior_logvar)
        dkl = beta * (_beside(grad_first, m) if terms == "row" else grad_first.to(m.dtype))
        dkl = torch.where(elements >= free_bits, dkl, 0.0)
        ratio, away = (lv - plv).exp(), m - pm
        dm = dm + dkl * away * precision
        dlv = dlv + 0.5 * dkl * (ratio - 1.0)
        dpm = dpm - dkl * away * precision
        dplv = dplv + 0.5 * dkl * (1.0 - ratio - away * away * precision)
    dlv = torch.where((unclamped >= clamp_low) & (unclamped <= clamp_high), dlv, 0.0)
    if antithetic:
        dnoise = dnoise[0::2] - dnoise[1::2]
    narrow = lambda x: x.to(mean.dtype).clone(memory_format=torch.contiguous_format)
    nothing = lambda: mean.new_zeros(0)
    first, second = (narrow(torch.cat((dm, dlv), chunk_dim)), nothing()) if chunked else (narrow(dm), narrow(dlv))
    assert first.shape == parameters.shape
    return (
        first, second, narrow(dnoise if samples else dnoise[0]) if noise_grad else nothing(),
        narrow(dpm) if prior_grad else nothing(), narrow(dplv) if prior_grad else nothing(),
    )
