"""The Gumbel softmax: a differentiable draw of a category."""
from __future__ import annotations

import math

from torch import Tensor

from . import _checks as check
from ._ops import keep, recall, route, signature
from .rng import Source, key_of

STREAM_TAG = 6      # bits 56 to 63 of the stream: the noise is rng.gumbel(..., stream=(STREAM_TAG << 56) + stream)


def gumbel_softmax(
    logits: Tensor,                         # [..., n, ...] float32, bfloat16, float16 (float64: reference)
    tau: float = 1.0,                       # temperature, above 0
    hard: bool = False,                     # one-hot, with the soft sample's gradient (straight through)
    dim: int = -1,                          # of the categories
    *,
    seed: int | Tensor | None = None,       # int, or int64 tensor [] or [B]; None draws one from torch's generator
    stream: int | Tensor = 0,               # int below 2^56, or int64 tensor [] or [B]
    offset: int | Tensor = 0,               # blocks of four numbers to skip
    generator: Source = None,               # instead of a seed: see rng.Generator
    out: Tensor | None = None,              # as logits; not together with a gradient
    backend: str | None = None,
) -> Tensor:                                # as logits
    """softmax((logits + g) / tau) with Gumbel noise g, in one pass (Jang et al.; Maddison et al., 2017).

    As torch.nn.functional.gumbel_softmax, but finite in half types (the sum is float32), exactly one-hot where hard,
    and with a seed. The noise is `rng.gumbel` of logits with `dim` moved last; with keys [B] row b of its dim 0 has the
    bits it has alone. Forward keeps nothing but logits and the key: backward draws the noise again.
    Raises ValueError or TypeError that names the argument.
    """
    if not (isinstance(tau, (int, float)) and tau > 0 and math.isfinite(tau)):
        raise ValueError(f"tau={tau!r}: expected a finite number above 0")
    given = signature(
        "gumbel_softmax", logits, hard, dim, out, backend,
        *(x if isinstance(x, Tensor) else None for x in (seed, stream, offset)),
    )
    if (run := recall(given)) is None:
        check.is_float_tensor("logits", logits)
        if not logits.dim() or not -logits.dim() <= dim < logits.dim():
            raise ValueError(f"dim={dim}: expected a dim of logits, which has {logits.dim()}")
        check.is_out(out, logits.shape, logits.dtype, logits.device)
    moved = logits.movedim(dim, -1)
    rows = moved.shape[0] if moved.dim() > 1 else 1     # one dim: a row of its own, so that keys [1] are a row's
    key = key_of(generator, seed, stream, offset, rows, logits.device, STREAM_TAG)
    args = (moved if moved.dim() > 1 else moved[None], *key, float(tau), hard)
    if run is None:
        run = route("gumbel_softmax", args, backend)
        keep(given, run)
    result = run(*args).movedim(-1, dim) if moved.dim() > 1 else run(*args)[0]
    return result if out is None else out.copy_(result)


__all__ = ["gumbel_softmax"]
