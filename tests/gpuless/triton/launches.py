"""The calls whose kernels are compiled for every architecture and kept in the kernel report, one function a stem.

Each makes the host wrappers' real calls on `meta` tensors: a shape for each configuration that a wrapper chooses.
"""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

META = torch.device("meta")
KEY = (7, None, 9, None, 0, None)
DTYPES = (torch.float32, torch.bfloat16)


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def seeds(rows: int) -> tuple[object, ...]:
    return 0, empty(rows, dtype=torch.int64), 9, None, 0, None


def rng() -> None:
    from onepass.kernels import rng as kernels
    from onepass.reference.rng import DISTRIBUTIONS

    for name in DISTRIBUTIONS:
        kernels.fill([1 << 20], name, *KEY, torch.float32, META)
    kernels.fill([64, 4096], "normal", *seeds(64), torch.bfloat16, META)
    kernels.fill([64, 5], "normal", *seeds(64), torch.float16, META)


def reparam() -> None:
    from onepass.kernels import reparam as kernels

    for dtype in DTYPES:
        x = empty(64, 4096, dtype=dtype)
        kernels.forward(x, x, None, *KEY, False)
        kernels.forward(x, x, None, *seeds(64), True)
        kernels.backward(x, empty(64), x, x, None, *seeds(64), False)
        kernels.backward(x, empty(64), x, x, x, *KEY, True)
    x = empty(64, 16)
    kernels.forward(x, x, None, *KEY, True)
    x = empty(64, 5)
    kernels.forward(x, x, None, *KEY, True)


def denoise() -> None:
    from onepass.kernels import denoise as kernels

    steps, guidances = empty(8, dtype=torch.int64), empty(8)
    for dtype in DTYPES:
        x = empty(8, 4, 64, 64, dtype=dtype)
        state = empty(8, 2, 4, 64, 64, dtype=dtype)
        step = lambda cond, table, state, noise, stochastic, mask, x=x: kernels.denoise_step(
            x, x, cond, table, 0, steps, state, 1.0, guidances, 0, steps, noise, stochastic, mask,
            None if mask is None else x,
        )
        step(None, empty(50, 9, dtype=torch.float64), None, None, False, None)
        step(x, empty(50, 11, dtype=torch.float64), state, None, True, empty(64, 64, dtype=torch.bool))
    half = x
    x = x.float()
    kernels.denoise_step(x, half, half, empty(50, 9, dtype=torch.float64), 3, None, None, 7.5, None, 0, None, x, True,
                         None, None)


STEMS: dict[str, Callable[[], None]] = {"rng": rng, "reparam": reparam, "denoise": denoise}
