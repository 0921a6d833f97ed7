"""The denoising step in CUDA: every feature of a row, and what only a device decides."""
from __future__ import annotations

import math

import pytest
import torch

from onepass import denoise_step

import cases
from denoise_rows import PLAN, ROWS, inputs, plain_batch
from helpers import assert_as_good_as_torch


def on(device, tensors):
    return [x.clone().to(device) for x in tensors]


@pytest.mark.parametrize("dtype", cases.FLOATS)
@pytest.mark.parametrize("shape", [shape for shape in cases.LATENTS if math.prod(shape)])
def test_values(shape, dtype, device):
    given = inputs(shape, dtype)
    steps, guidance = torch.arange(shape[0]) % len(ROWS), torch.linspace(0, 3, shape[0])
    x, u, c, z, known, state, mask = on(device, given)
    got = denoise_step(x, (u, c), PLAN.to(device), steps.to(device), state=state, guidance=guidance.to(device), noise=z,
                       mask=mask, known=known, backend="cuda")
    same, wide = on("cpu", given), [t.double() for t in given]
    eager, truth = (plain_batch(t, steps.tolist(), guidance.tolist()) for t in (same, wide))
    assert_as_good_as_torch(got.cpu(), eager, truth)
    assert_as_good_as_torch(state.cpu(), same[5], wide[5], "state")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 5, 7), (2, 4, 8, 8), (3, 5003)])
def test_noise_and_models_of_half_precision(shape, dtype, device):
    """float32 samples with a narrower model; noise drawn where a row begins inside a block of four."""
    x, u, c, _, known, state, mask = inputs(shape)
    steps = torch.tensor([2, 4, 5])[: shape[0]]
    for seed in (5, torch.arange(shape[0]) + 9):
        results = []
        for where, backend in ((device, "cuda"), ("cpu", "reference")):
            mine = state.clone().to(where)
            key = seed.to(where) if isinstance(seed, torch.Tensor) else seed
            prev = denoise_step(x.to(where), (u.to(where, dtype), c.to(where, dtype)), PLAN.to(where), steps.to(where),
                                state=mine, guidance=2.5, seed=key, mask=mask.to(where), known=known.to(where),
                                backend=backend)
            results.append((prev.cpu(), mine.cpu()))
        torch.testing.assert_close(*results, rtol=3e-6, atol=3e-6)


def test_a_step_outside_the_plan_leaves_its_row_alone(device):
    """Steps on a device are not read by the host; a number is, and refused."""
    from onepass._native import denoise as native

    x, u, *_ = inputs((4, 3, 33))
    x, u = x.to(device), u.to(device)
    plan = PLAN.to(device)
    steps = torch.tensor([0, -1, 6, len(ROWS)], device=device)
    out = torch.full_like(x, 7.0)
    state = torch.zeros(4, PLAN.slots, 3, 33, device=device)
    arguments = (x, u, None, plan.table)
    rest = (1.0, None, 0, None, None, True, None, None)
    native.denoise_step(*arguments, 0, steps, state, *rest, out=out)
    assert (out[1] == 7).all() and (out[3] == 7).all()
    assert torch.equal(out[2], u[2])
    with pytest.raises(ValueError, match=r"step of row 0 is 8, expected 0 \.\. 7"):
        native.denoise_step(*arguments, 8, None, state, *rest)
