"""The Gumbel softmax (Jang et al., "Categorical reparameterization with Gumbel-softmax", 2017; Maddison et al., "The
concrete distribution", 2017): softmax((logits + g) / tau) with standard Gumbel noise g."""
import torch
from torch import Tensor

from . import rng
from .reparam import _wide


def _soft(
    logits: Tensor, seed: int, seeds: Tensor | None, stream: int, streams: Tensor | None, offset: int,
    offsets: Tensor | None, tau: float,
) -> Tensor:
    noise = rng.fill(
        list(logits.shape), "gumbel", seed, seeds, stream, streams, offset, offsets, torch.float32, logits.device
    )
    wide = _wide(logits)
    return torch.softmax((wide + noise.to(wide.dtype)) / tau, -1)


def gumbel_softmax(
    logits: Tensor,                             # [..., n]
    seed: int, seeds: Tensor | None,            # the key, as in rng.fill
    stream: int, streams: Tensor | None,
    offset: int, offsets: Tensor | None,
    tau: float,
    hard: bool,
) -> Tensor:                                    # as logits; hard: 1 at the first of the largest, else 0
    soft = _soft(logits, seed, seeds, stream, streams, offset, offsets, tau)
    if hard and soft.numel():
        chosen = soft.argmax(-1, keepdim=True)
        return torch.zeros(logits.shape, dtype=logits.dtype, device=logits.device).scatter_(-1, chosen, 1.0)
    return soft.to(logits.dtype).contiguous()


def gumbel_softmax_backward(
    grad: Tensor,                               # as logits
    logits: Tensor,
    seed: int, seeds: Tensor | None,
    stream: int, streams: Tensor | None,
    offset: int, offsets: Tensor | None,
    tau: float,
) -> Tensor:                                    # the soft sample's gradient, whichever was returned
    soft, on = _soft(logits, seed, seeds, stream, streams, offset, offsets, tau), _wide(grad)
    return (soft * (on - (on * soft).sum(-1, keepdim=True)) / tau).to(logits.dtype).contiguous()
