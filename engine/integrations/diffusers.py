"""diffusers' Gaussian latents and noise: DiagonalGaussianDistribution, randn_tensor, and a VAE that uses them."""
from __future__ import annotations

import functools
import types
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.autoencoders import vae as _stock
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor

from ..reparam import reparameterize_kl
from ..rng import Generator, Source, normal

_CLAMP = (-30.0, 20.0)      # what diffusers clamps logvar to
_SUMMED = [1, 2, 3]         # the dims that diffusers sums a KL over: of video latents the last one stays


class DiagonalGaussianDistribution(_stock.DiagonalGaussianDistribution):
    """diffusers' class of the same name: z and its KL in one pass over `parameters`, backward in one more.

    `std`, `var` and the clamped `logvar` are made when asked for. `sample` takes diffusers' generators, lists of them
    and `onepass.rng.Generator`; its noise is onepass's, keyed by a seed that it draws from the generator. The KL is
    summed in float32 and comes in the dtype of `parameters`, as there.
    """

    def __init__(self, parameters: Tensor, deterministic: bool = False) -> None:
        self.parameters = parameters
        self.deterministic = deterministic
        self._kl: tuple[bool, Tensor] | None = None     # of the last sample, and whether it has a graph

    @functools.cached_property
    def mean(self) -> Tensor:       # type: ignore[override]
        return self.parameters.chunk(2, 1)[0]

    @functools.cached_property
    def logvar(self) -> Tensor:     # type: ignore[override]
        return self.parameters.chunk(2, 1)[1].clamp(*_CLAMP)

    @functools.cached_property
    def std(self) -> Tensor:        # type: ignore[override]
        return torch.zeros_like(self.mean) if self.deterministic else torch.exp(0.5 * self.logvar)

    @functools.cached_property
    def var(self) -> Tensor:        # type: ignore[override]
        return torch.zeros_like(self.mean) if self.deterministic else torch.exp(self.logvar)

    def sample(self, generator: Source = None, *, seed: int | Tensor | None = None) -> Tensor:
        """As there; `seed` (an int, or an int64 tensor [B]) instead of a generator."""
        if self.deterministic:
            return self.mean.clone()
        z, kl = reparameterize_kl(
            self.parameters, chunk_dim=1, clamp=_CLAMP, generator=_single(generator), seed=seed
        )
        if self.parameters.dim() == 4:
            self._kl = torch.is_grad_enabled(), kl
        return z

    def kl(self, other: _stock.DiagonalGaussianDistribution | None = None) -> Tensor:
        if self.deterministic or (other is not None and other.deterministic):
            return super().kl(other)        # type: ignore[arg-type]
        if other is None and self._kl is not None and self._kl[0] == torch.is_grad_enabled():
            return self._kl[1].to(self.parameters.dtype)
        by_row = self.parameters.dim() == 4
        prior_mean, prior_logvar = (None, None) if other is None else (other.mean, other.logvar)
        # Some noise has to be given, and the z that it makes is dropped: nothing is drawn.
        kl = reparameterize_kl(
            self.parameters, chunk_dim=1, clamp=_CLAMP, noise=self.mean.detach(),
            reduction="row" if by_row else "none", prior_mean=prior_mean, prior_logvar=prior_logvar,
        )[1]
        return (kl if by_row else kl.sum(_SUMMED)).to(self.parameters.dtype)


def _single(generator: Any) -> Any:
    """A list of one generator counts as that generator, as in diffusers."""
    return generator[0] if isinstance(generator, (list, tuple)) and len(generator) == 1 else generator


def randn_tensor(
    shape: Sequence[int],
    generator: Source = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    layout: torch.layout | None = None,
    *,
    seed: int | Tensor | None = None,       # instead of a generator: an int, or an int64 tensor [shape[0]]
) -> Tensor:
    """diffusers' `randn_tensor`: with a list of generators, or seeds [B], a sample has the bits that it has alone.

    The noise is onepass's, the same on every device, keyed by a seed drawn from each generator.
    """
    if layout not in (None, torch.strided):
        raise ValueError(f"layout={layout}: expected torch.strided")
    place = torch.device(device or "cpu")
    for one in generator if isinstance(generator, (list, tuple)) else [generator]:
        if isinstance(one, torch.Generator) and one.device.type == "cuda" and place.type != "cuda":
            raise ValueError(f"Cannot generate a {place} tensor from a generator of type {one.device.type}.")
    return normal(tuple(shape), seed=seed, generator=_single(generator), device=place, dtype=dtype)


@dataclass(frozen=True)
class Report:
    """What `accelerate` swapped."""

    swapped: tuple[str, ...]
    kept: tuple[str, ...]       # with the reason
    before: str                 # the distribution that was there


@apply_forward_hook
def _encode(self: Any, x: Tensor, return_dict: bool = True) -> Any:
    """AutoencoderKL.encode with onepass's distribution."""
    h = torch.cat([self._encode(part) for part in x.split(1)]) if self.use_slicing and len(x) > 1 else self._encode(x)
    posterior = DiagonalGaussianDistribution(h)
    return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)


def accelerate(vae: Any) -> Report:
    """Makes an AutoencoderKL return onepass's DiagonalGaussianDistribution, in place; `restore` undoes it."""
    before = f"{_stock.__name__}.DiagonalGaussianDistribution"
    if not isinstance(vae, AutoencoderKL) or type(vae).encode is not AutoencoderKL.encode:
        return Report((), (f"encode: {type(vae).__name__} has its own, only AutoencoderKL's is known",), before)
    vae.encode = types.MethodType(_encode, vae)
    return Report(("encode",), (), before)


def restore(vae: Any) -> None:
    """Gives a VAE that `accelerate` changed its own `encode` back; another one stays as it is."""
    vars(vae).pop("encode", None)


__all__ = ["DiagonalGaussianDistribution", "Generator", "Report", "accelerate", "randn_tensor", "restore"]
