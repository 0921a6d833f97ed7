"""torch.distributions with onepass's random numbers: the same sample on every device, from a seed or a generator."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributions

from ..rng import Source, keyed, normal

_SHAPE = torch.Size()


def _affine(loc: Tensor, scale: Tensor, shape: torch.Size, seed: Any, stream: Any) -> Tensor:
    """loc + scale eps of drawn eps."""
    eps = normal(shape, seed=seed, stream=stream, dtype=loc.dtype, device=loc.device)
    return torch.addcmul(loc, eps, scale, out=eps)


class _Affine(torch.autograd.Function):
    """The same with a gradient. Nothing of the noise is kept: backward draws it again."""

    @staticmethod
    def forward(ctx: Any, loc: Tensor, scale: Tensor, shape: torch.Size, seed: Any, stream: Any) -> Tensor:
        ctx.key = shape, seed, stream
        ctx.sizes = loc.shape, scale.shape
        return _affine(loc, scale, shape, seed, stream)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        shape, seed, stream = ctx.key
        grad_scale = None
        if ctx.needs_input_grad[1]:
            eps = normal(shape, seed=seed, stream=stream, dtype=grad.dtype, device=grad.device)
            grad_scale = (grad * eps).sum_to_size(ctx.sizes[1])
        return grad.sum_to_size(ctx.sizes[0]), grad_scale, None, None, None


class Normal(distributions.Normal):
    """torch.distributions.Normal in all but where its noise comes from.

    `rsample` and `sample` take `seed=` (an int, or an int64 tensor [n] for the first dim of the result), `stream=` and
    `generator=` as `onepass.rng.normal` does. Gradients of `rsample` replay the noise instead of keeping it.
    """

    def rsample(
        self, sample_shape: Any = _SHAPE, *, seed: int | Tensor | None = None, stream: int | Tensor = 0,
        generator: Source = None,
    ) -> Tensor:
        shape = self._extended_shape(sample_shape)
        rows = shape[0] if shape else 1
        seed, stream = keyed(generator, seed, stream, rows, self.loc.device)
        needed = torch.is_grad_enabled() and (self.loc.requires_grad or self.scale.requires_grad)
        return (_Affine.apply if needed else _affine)(self.loc, self.scale, shape, seed, stream)

    def sample(
        self, sample_shape: Any = _SHAPE, *, seed: int | Tensor | None = None, stream: int | Tensor = 0,
        generator: Source = None,
    ) -> Tensor:
        with torch.no_grad():
            return self.rsample(sample_shape, seed=seed, stream=stream, generator=generator)


class Independent(distributions.Independent):
    """torch.distributions.Independent whose samples take what the base distribution's do."""

    def rsample(self, sample_shape: Any = _SHAPE, **key: Any) -> Tensor:
        return self.base_dist.rsample(sample_shape, **key)

    def sample(self, sample_shape: Any = _SHAPE, **key: Any) -> Tensor:
        return self.base_dist.sample(sample_shape, **key)


__all__ = ["Independent", "Normal"]
