"""Measures ln, ln(1 - u), sin and cos of the recipe in ulp over every u that a 32-bit word gives, against float64.

    python tests/rng_error.py            every word (a minute or two)
    python tests/rng_error.py 997        one word in 997

float64's own error is 2^-29 of a float32 ulp. sin and cos of 2 pi u are reduced in exact quarter turns there too.
"""
from __future__ import annotations

import math
import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from onepass.reference import rng

CHUNK = 1 << 22


def _words(stride: int) -> Iterator[Tensor]:
    """Words in ascending order; above 2^24 float32 holds one word in 2, 4, ... 256, so only those are visited."""
    start, step = 0, 1
    while start < 2**32:
        stop = max(2**24, 2 * start)
        for low in range(start, stop, CHUNK * step * stride):
            yield torch.arange(low, min(stop, low + CHUNK * step * stride), step * stride)
        start, step = stop, max(1, stop >> 24)
    yield torch.arange(2**32 - 1024, 2**32)


def _ulp(got: Tensor, truth: Tensor) -> float:
    """Largest error in units of the last place of the float32 nearest to the truth."""
    _, exponent = torch.frexp(truth)
    return ((got.double() - truth).abs() / torch.ldexp(torch.ones_like(truth), exponent - 24)).max().item()


def measure(stride: int) -> dict[str, float]:
    worst = {"ln": 0.0, "ln(1 - u)": 0.0, "sin": 0.0, "cos": 0.0}
    for word in _words(stride):
        u = rng.unit(word)
        exact = u.double()
        quarter = torch.floor(4 * exact + 0.5)
        angle, turn = (4 * exact - quarter) * (math.pi / 2), quarter.long() & 3
        odd = (turn & 1).bool()
        sin = torch.where(odd, angle.cos(), angle.sin()) * torch.where(turn >= 2, -1, 1)
        cos = torch.where(odd, angle.sin(), angle.cos()) * torch.where((turn == 1) | (turn == 2), -1, 1)
        got_sin, got_cos = rng.sincos_turn(u)
        for name, got, truth in (
            ("ln", rng.ln(u), exact.log()), ("ln(1 - u)", rng.log1p_neg(u), torch.log1p(-exact)),
            ("sin", got_sin, sin), ("cos", got_cos, cos),
        ):
            worst[name] = max(worst[name], _ulp(got, truth))
    return worst


if __name__ == "__main__":
    for name, ulp in measure(int(sys.argv[1]) if len(sys.argv) > 1 else 1).items():
        print(f"{name:<10} {ulp:.3f} ulp")
