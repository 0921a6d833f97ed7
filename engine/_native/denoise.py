"""The denoising step on the CPU and on CUDA devices."""
from __future__ import annotations

import torch
from torch import Tensor

from . import _C, DTYPES, by_rows, empty_like, kernels, key_part, mask_rows, row_length

_NONE = (0, 0)


def denoise_step(
    sample: Tensor, model_output: Tensor, cond: Tensor | None, table: Tensor,
    step: int, steps: Tensor | None, state: Tensor | None,
    guidance: float, guidances: Tensor | None, seed: int, seeds: Tensor | None,
    noise: Tensor | None, stochastic: bool, mask: Tensor | None, known: Tensor | None, out: Tensor | None = None,
) -> Tensor:
    batch, length = row_length(sample)
    held: list[Tensor | None] = []               # keeps what the pointers point into

    def rows(x: Tensor | None) -> tuple[int, int]:
        if x is None:
            return _NONE
        x, row_step = by_rows(x, length)
        held.append(x)
        return x.data_ptr(), row_step

    direct = out is not None and by_rows(out, length)[0] is out and (batch < 2 or out.stride(0) >= length)
    result = out if direct and out is not None else empty_like(sample)
    table = table.contiguous()
    weights, described_mask = _mask(mask, sample)
    held.append(weights)
    scales = None if guidances is None else guidances.float()
    native, place = kernels(sample)
    bad = native.denoise_step(
        batch, length, DTYPES[sample.dtype], DTYPES[model_output.dtype],
        rows(sample), rows(model_output), rows(cond), rows(noise), rows(known), described_mask,
        (table.data_ptr(), table.shape[0], table.shape[1] - _C.DENOISE_COLUMNS), key_part(step, steps),
        (guidance, *key_part(0, scales)[1:]), key_part(seed, seeds), seeds is not None and seeds.dim() == 1,
        0 if state is None else state.data_ptr(), rows(result), place,
    )
    if bad >= 0:
        value = step if steps is None else int(steps.reshape(-1)[bad if steps.dim() else 0])
        raise ValueError(f"step of row {bad} is {value}, expected 0 .. {table.shape[0] - 1}, a row of the plan")
    if state is not None:
        torch.autograd.graph.increment_version(state)
    return result if direct or out is None else out.copy_(result)


def _mask(mask: Tensor | None, sample: Tensor) -> tuple[Tensor | None, tuple[int, bool, int, int]]:
    """The mask as bytes or floats, and its description."""
    if mask is None:
        return None, (0, False, 0, 0)
    full, step, period = mask_rows(mask, sample)
    return full, (full.data_ptr(), full.dtype != torch.bool, step, period)
