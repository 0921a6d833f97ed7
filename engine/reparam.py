"""The reparameterization trick in one pass, with the KL to the standard normal; backward replays the noise."""
from __future__ import annotations

from torch import Tensor

from . import _checks as check
from ._ops import call

STREAM_TAG = 1      # bits 56 to 63 of the stream: the noise is rng.normal(..., stream=(STREAM_TAG << 56) + stream)


def _core_arguments(
    mean: Tensor, logvar: Tensor, noise: Tensor | None, seed: int | Tensor | None, stream: int | Tensor,
    offset: int | Tensor,
) -> tuple[object, ...]:
    check.is_float_tensor("mean", mean)
    check.is_like("logvar", logvar, "mean", mean)
    if noise is not None:
        check.is_like("noise", noise, "mean", mean)
        if seed is not None:
            raise ValueError("noise and seed are both given: expected at most one of them")
        return mean, logvar, noise, 0, None, 0, None, 0, None
    rows = mean.shape[0] if mean.dim() else 1
    parts = (
        ("seed", check.fresh_seed(mean.device) if seed is None else seed),
        ("stream", check.tagged_stream(STREAM_TAG, stream)),
        ("offset", offset),
    )
    key = [part for name, value in parts for part in check.random_key(name, value, rows, mean.device)]
    return mean, logvar, None, *key


def reparameterize(
    mean: Tensor,                           # [B, ...] float32, bfloat16, float16 (float64: reference)
    logvar: Tensor,                         # as mean: the logarithm of the variance
    *,
    seed: int | Tensor | None = None,       # int, or int64 tensor [] or [B]; None draws one from torch's generator
    stream: int | Tensor = 0,               # int below 2^56, or int64 tensor [] or [B]: a step or position
    offset: int | Tensor = 0,               # blocks of four normals to skip
    noise: Tensor | None = None,            # as mean: used instead of drawing
    out: Tensor | None = None,              # as mean, takes z; not together with a gradient
    backend: str | None = None,
) -> Tensor:                                # as mean
    """z = mean + exp(logvar / 2) eps with eps ~ N(0, 1) (Kingma and Welling, 2014).

    The noise depends on (seed, stream, element) alone: with seeds [B] a row of a batch has the bits it has alone.
    Gradients flow to mean, logvar and noise; backward draws the noise again and forward keeps nothing but its inputs.
    Raises ValueError or TypeError where shapes, dtypes or devices differ, or where both noise and seed are given.
    """
    args = _core_arguments(mean, logvar, noise, seed, stream, offset)
    check.is_out(out, mean.shape, mean.dtype, mean.device)
    return call("reparameterize", *args, False, backend=backend, out=None if out is None else (out, None))[0]


def reparameterize_kl(
    mean: Tensor,                           # [B, ...]
    logvar: Tensor,                         # as mean
    *,
    seed: int | Tensor | None = None,
    stream: int | Tensor = 0,
    offset: int | Tensor = 0,
    noise: Tensor | None = None,
    reduction: str = "row",                 # "row": [B], summed over the other dims; "sum": []; "mean": [] over B
    out: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """z as in `reparameterize`, and KL(N(mean, exp(logvar)) || N(0, 1)) = sum (exp(logvar) + mean^2 - 1 - logvar) / 2.

    Both in one pass over mean and logvar. The KL is float32 (float64 for float64 inputs), in nats.
    """
    check.one_of("reduction", reduction, ("row", "sum", "mean"))
    args = _core_arguments(mean, logvar, noise, seed, stream, offset)
    check.is_out(out, mean.shape, mean.dtype, mean.device)
    z, kl = call("reparameterize", *args, True, backend=backend, out=None if out is None else (out, None))
    if reduction == "row":
        return z, kl
    return z, kl.sum() if reduction == "sum" else kl.mean()


__all__ = ["reparameterize", "reparameterize_kl"]
