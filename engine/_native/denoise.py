"""The denoising step on the CPU and on CUDA devices."""
from __future__ import annotations

import torch
from torch import Tensor

from . import empty_like, is_writable, kernels, mask_rows, run

_NO_MASK = (None, 0, 1)


def denoise_step(
    sample: Tensor, model_output: Tensor, cond: Tensor | None, table: Tensor,
    step: int, steps: Tensor | None, state: Tensor | None,
    guidance: float, guidances: Tensor | None, seed: int, seeds: Tensor | None,
    noise: Tensor | None, stochastic: bool, mask: Tensor | None, known: Tensor | None, out: Tensor | None = None,
) -> Tensor:
    direct = out is not None and is_writable(out)
    result = out if direct and out is not None else empty_like(sample)
    native, place = kernels(sample)
    run(
        native.denoise_step, sample, model_output, cond, noise, known,
        *(_NO_MASK if mask is None else mask_rows(mask, sample)), table, step, steps, guidance,
        None if guidances is None else guidances.float(), seed, seeds, state, result, place,
    )
    if state is not None:
        torch.autograd.graph.increment_version(state)
    return result if direct or out is None else out.copy_(result)
