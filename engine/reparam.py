"""The reparameterization trick in one pass, with its KL or importance weights; backward replays the noise."""
from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import Tensor

from . import _checks as check
from ._ops import keep, recall, route, signature
from .rng import Source, key_of

STREAM_TAG = 1      # bits 56 to 63 of the stream: the noise is rng.normal(..., stream=(STREAM_TAG << 56) + stream)

_NO_OPTIONS = (0, -math.inf, math.inf, 0, False)
_NO_KEY = (0, None, 0, None, 0, None)


def _halves(mean: Tensor, logvar: Tensor | None, chunk_dim: int | None) -> tuple[list[Any], int]:
    """The shape of mean and the dim that holds both halves (0 where they are two tensors)."""
    check.is_float_tensor("mean", mean)
    if logvar is not None:
        if chunk_dim is not None:
            raise ValueError("logvar and chunk_dim are both given: expected logvar, or chunk_dim of one tensor")
        check.is_like("logvar", logvar, "mean", mean)
        return list(mean.shape), 0
    dim = 1 if chunk_dim is None else chunk_dim
    if not -mean.dim() <= dim < mean.dim():
        raise ValueError(f"chunk_dim={dim}: expected a dim of mean, which has {mean.dim()}")
    dim %= mean.dim()
    shape = list(mean.shape)
    if shape[dim] % 2:
        raise ValueError(f"mean has {shape[dim]} elements in dim {dim}, expected an even number: mean, then logvar")
    shape[dim] //= 2
    return shape, dim


def _bounds(clamp: tuple[float | None, float | None] | None) -> tuple[float, float]:
    if clamp is None:
        return -math.inf, math.inf
    if not isinstance(clamp, (tuple, list)) or len(clamp) != 2:
        raise TypeError(f"clamp={clamp!r}: expected (low, high), either may be None")
    low = -math.inf if clamp[0] is None else float(clamp[0])
    high = math.inf if clamp[1] is None else float(clamp[1])
    if not low <= high:
        raise ValueError(f"clamp={clamp!r}: expected low <= high")
    return low, high


def _count(samples: int | None, antithetic: bool) -> int:
    if samples is None:
        if antithetic:
            raise ValueError("antithetic=True: expected samples, an even number")
        return 0
    if isinstance(samples, bool) or not isinstance(samples, int) or not 1 <= samples < 2**20:
        raise ValueError(f"samples={samples!r}: expected an int from 1 to 2**20 - 1, or None")
    if antithetic and samples % 2:
        raise ValueError(f"samples={samples} with antithetic=True: expected an even number")
    return samples


def _is_prior(prior_mean: Tensor | None, prior_logvar: Tensor | None, mean: Tensor, shape: list[Any]) -> None:
    if (prior_mean is None) != (prior_logvar is None):
        raise ValueError("prior_mean and prior_logvar: expected both or neither")
    for name, x in (("prior_mean", prior_mean), ("prior_logvar", prior_logvar)):
        if x is None:
            continue
        check.is_float_tensor(name, x)
        if x.dtype != mean.dtype or x.device != mean.device:
            raise TypeError(f"{name} is {x.dtype} on {x.device}, expected {mean.dtype} on {mean.device} as mean")
        sizes = zip(reversed(x.shape), reversed(shape), strict=False)
        if x.dim() > len(shape) or any(a not in (1, b) for a, b in sizes):
            raise ValueError(f"{name} has shape {tuple(x.shape)}, expected one that broadcasts to {tuple(shape)}")


def _is_noise(
    noise: Tensor, mean: Tensor, drawn: list[Any], seed: int | Tensor | None, generator: Source
) -> None:
    check.is_float_tensor("noise", noise)
    if list(noise.shape) != drawn:
        raise ValueError(f"noise has shape {tuple(noise.shape)}, expected {tuple(drawn)}")
    if noise.dtype != mean.dtype or noise.device != mean.device:
        raise TypeError(f"noise is {noise.dtype} on {noise.device}, expected {mean.dtype} on {mean.device} as mean")
    for name, other in (("seed", seed), ("generator", generator)):
        if other is not None:
            raise ValueError(f"noise and {name} are both given: expected at most one of them")


class _Plan(NamedTuple):
    """What a call's checks found."""

    shape: list[Any]
    options: tuple[Any, ...] | None             # of latent_sample; None: `reparameterize`, which has none


def _checked(
    mean: Tensor, logvar: Tensor | None, chunk_dim: int | None, clamp: Any, samples: int | None, antithetic: bool,
    prior_mean: Tensor | None, prior_logvar: Tensor | None, terms: str, beta: float, free_bits: float,
    seed: int | Tensor | None, generator: Source, noise: Tensor | None, out: Tensor | None,
) -> _Plan:
    shape, dim = _halves(mean, logvar, chunk_dim)
    low, high = _bounds(clamp)
    count = _count(samples, antithetic)
    _is_prior(prior_mean, prior_logvar, mean, shape)
    if noise is not None:
        _is_noise(noise, mean, [count // 2 if antithetic else count, *shape] if count else shape, seed, generator)
    check.is_out(out, [count, *shape] if count else shape, mean.dtype, mean.device)
    options = dim, low, high, count, antithetic
    plain = logvar is not None and prior_mean is None and options == _NO_OPTIONS
    if plain and terms in ("none", "row") and beta == 1.0 and free_bits == -math.inf:
        return _Plan(shape, None)
    return _Plan(shape, (*options, terms, beta, free_bits))


def _sample(
    mean: Tensor, logvar: Tensor | None, chunk_dim: int | None, clamp: Any, samples: int | None, antithetic: bool,
    prior_mean: Tensor | None, prior_logvar: Tensor | None, terms: str, beta: float, free_bits: float,
    seed: int | Tensor | None, stream: int | Tensor, offset: int | Tensor, generator: Source, noise: Tensor | None,
    out: Tensor | None, backend: str | None,
) -> tuple[Tensor, ...]:
    """The core op that takes these options: the plain one has kernels everywhere."""
    given = signature(
        "sample", mean, logvar, chunk_dim, clamp, samples, antithetic, prior_mean, prior_logvar, terms, beta, free_bits,
        noise, out, backend, noise is None or (seed is None and generator is None),
        *(x if isinstance(x, Tensor) else None for x in (seed, stream, offset)),
    )
    known = recall(given)
    run, plan = known or (None, _checked(
        mean, logvar, chunk_dim, clamp, samples, antithetic, prior_mean, prior_logvar, terms, beta, free_bits, seed,
        generator, noise, out,
    ))
    shape, options = plan
    key: tuple[Any, ...] = _NO_KEY
    if noise is None:
        rows = shape[0] if shape else 1
        key = key_of(generator, seed, stream, offset, rows, mean.device, STREAM_TAG)
    args: tuple[Any, ...] = (mean, logvar, noise, *key)
    if options is None:
        args += (terms == "row",)
    else:
        args += (*(None if x is None else x.expand(shape) for x in (prior_mean, prior_logvar)), *options)
    if run is None:
        run = route("reparameterize" if options is None else "latent_sample", args, backend)
        keep(given, (run, plan))
    return run(*args) if out is None else run(*args, out=(out, None) if options is None else (out, None, None))


def reparameterize(
    mean: Tensor,                           # [B, ...] float32, bfloat16, float16 (float64: reference)
    logvar: Tensor | None = None,           # as mean: the logarithm of the variance; None: mean holds both
    *,
    chunk_dim: int | None = None,           # of one tensor: the dim whose halves are mean and logvar; None is 1
    clamp: tuple[float | None, float | None] | None = None,     # logvar is clamped to (low, high) first
    samples: int | None = None,             # K: z gets a leading dim [K, ...]
    antithetic: bool = False,               # sample 2 i + 1 has the noise of sample 2 i, negated
    seed: int | Tensor | None = None,       # int, or int64 tensor [] or [B]; None draws one from torch's generator
    stream: int | Tensor = 0,               # int below 2^56, or int64 tensor [] or [B]: a step or position
    offset: int | Tensor = 0,               # blocks of four normals to skip
    generator: Source = None,               # instead of a seed: see rng.Generator
    noise: Tensor | None = None,            # as z (antithetic: [K / 2, ...]): used instead of drawing
    out: Tensor | None = None,              # as z, takes it; not together with a gradient
    backend: str | None = None,
) -> Tensor:                                # as mean, or [K, ...]
    """z = mean + exp(logvar / 2) eps with eps ~ N(0, 1) (Kingma and Welling, 2014).

    The noise depends on (seed, stream, element) alone: with seeds [B] a row of a batch has the bits it has alone.
    Sample k has the noise of a call with `offset + k * 2**40` (antithetic: k // 2), so more samples begin with fewer.
    Gradients flow to mean, logvar and noise; backward draws the noise again and forward keeps nothing but its inputs.
    A clamped logvar passes gradient at the bounds and inside, as torch.clamp does.
    Raises ValueError or TypeError where shapes, dtypes or devices differ, or where noise has two sources.
    """
    return _sample(
        mean, logvar, chunk_dim, clamp, samples, antithetic, None, None, "none", 1.0, -math.inf, seed, stream, offset,
        generator, noise, out, backend,
    )[0]


def reparameterize_kl(
    mean: Tensor,                           # [B, ...]
    logvar: Tensor | None = None,           # as mean; None: mean holds both
    *,
    chunk_dim: int | None = None,
    clamp: tuple[float | None, float | None] | None = None,
    samples: int | None = None,
    antithetic: bool = False,
    prior_mean: Tensor | None = None,       # broadcasts to mean; with prior_logvar: a Gaussian instead of N(0, 1)
    prior_logvar: Tensor | None = None,
    reduction: str = "row",                 # "row": [B], summed over the other dims; "sum": []; "mean": [] over B;
                                            # "none": as mean, an element's own
    beta: float = 1.0,                      # the KL's factor
    free_bits: float | None = None,         # nats below which the KL costs as much as this, and has no gradient
    free_bits_of: str = "element",          # whose: "element" or "row"
    seed: int | Tensor | None = None,
    stream: int | Tensor = 0,
    offset: int | Tensor = 0,
    generator: Source = None,
    noise: Tensor | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """z as in `reparameterize`, and beta KL(N(mean, exp(logvar)) || prior).

    Against N(0, 1) an element's KL is (exp(logvar) + mean^2 - 1 - logvar) / 2; against a second Gaussian
    (exp(logvar - prior_logvar) + (mean - prior_mean)^2 exp(-prior_logvar) - 1 + prior_logvar - logvar) / 2, with
    gradients to the prior too. Free bits: max(free_bits, KL), whose gradient is the KL's where it is at least as large.
    Both in one pass over mean and logvar. The KL is float32 (float64 for float64 inputs), in nats.
    """
    check.one_of("reduction", reduction, ("row", "sum", "mean", "none"))
    check.one_of("free_bits_of", free_bits_of, ("element", "row"))
    by_row = free_bits is not None and free_bits_of == "row"
    if by_row and reduction == "none":
        raise ValueError("free_bits_of='row' with reduction='none': expected a reduction over rows")
    floor = -math.inf if free_bits is None or by_row else float(free_bits)
    z, kl, *_ = _sample(
        mean, logvar, chunk_dim, clamp, samples, antithetic, prior_mean, prior_logvar,
        "element" if reduction == "none" else "row", 1.0 if by_row else float(beta), floor, seed, stream, offset,
        generator, noise, out, backend,
    )
    if by_row and free_bits is not None:
        kl = beta * kl.clamp_min(free_bits)
    if reduction in ("row", "none"):
        return z, kl
    return z, kl.sum() if reduction == "sum" else kl.mean()


def reparameterize_log_weights(
    mean: Tensor,
    logvar: Tensor | None = None,
    *,
    samples: int,                           # K
    chunk_dim: int | None = None,
    clamp: tuple[float | None, float | None] | None = None,
    antithetic: bool = False,
    prior_mean: Tensor | None = None,
    prior_logvar: Tensor | None = None,
    seed: int | Tensor | None = None,
    stream: int | Tensor = 0,
    offset: int | Tensor = 0,
    generator: Source = None,
    noise: Tensor | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:         # z [K, B, ...], log q(z | x) [K, B], log p(z) [K, B]
    """K samples as in `reparameterize` with their log densities under the posterior and the prior, each row's sum.

    The importance weighted bound (Burda et al., 2016) is
    `torch.logsumexp(log_likelihood + log_p - log_q, 0) - math.log(K)`. Densities are of the float32 sample, before it
    is rounded to the dtype of mean; they are float32. Gradients flow through z, as the bound's do, and to the prior.
    """
    z, log_q, log_p = _sample(
        mean, logvar, chunk_dim, clamp, samples, antithetic, prior_mean, prior_logvar, "weights", 1.0, -math.inf, seed,
        stream, offset, generator, noise, out, backend,
    )
    return z, log_q, log_p


__all__ = ["reparameterize", "reparameterize_kl", "reparameterize_log_weights"]
