"""Denoising steps of latents: DDIM, DDPM with clamp and noise, DPM-Solver++, guidance, rows at different steps.

Eager is the formula with its scalars made beforehand, as a careful author writes it; diffusers, its scheduler's step.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import onepass
from onepass import DenoisePlan, plans
from onepass.reference.denoise import STREAM_TAG

from .harness import COMPILED, Case

STEP, STEPS = 3, 10
SEED = 7
GUIDANCE = 7.5
LATENTS = ((8, 4, 64, 64), (64, 4, 64, 64), (1, 4, 128, 128))


def cases(device: torch.device) -> Iterator[Case]:
    for shape in LATENTS:
        for dtype in (torch.float32, torch.bfloat16):
            yield _ddim(device, shape, dtype)
    shape = LATENTS[1]
    yield _guided(device, shape)
    yield _ddpm(device, shape)
    yield _multistep(device, shape)
    yield _mixed(device, shape)


def _case(
    kind: str, shape: tuple[int, ...], dtype: torch.dtype, tensors: int, runs: dict[str, Callable[..., Any]],
    reference: Callable[..., Any], reads: int, writes: int, formula: str, **more: Any,
) -> Case:
    """`tensors` of that shape are the arguments; reads and writes count them."""
    size = math.prod(shape) * dtype.itemsize

    def make(device: torch.device) -> tuple:
        return tuple(torch.randn(shape, device=device).to(dtype) for _ in range(tensors))

    return Case(
        op="denoise_step",
        name=f"{kind}_b{shape[0]}_{'fp32' if dtype is torch.float32 else 'bf16'}",
        shape="x".join(map(str, shape)),
        dtype=dtype,
        make=make,
        implementations={name: run for name, run in runs.items() if run is not None},
        reference=reference,
        reads=reads * size,
        writes=writes * size,
        formula=formula,
        quick=shape == LATENTS[1],
        **more,
    )


def _abar(plan: DenoisePlan, row: int) -> tuple[float, float]:
    """alpha-bar before and after a step."""
    before, _, after, _ = plan.levels[row].tolist()
    return before**2, after**2


def _scheduler(name: str, **config: Any) -> Any:
    if not importlib.util.find_spec("diffusers"):
        return None
    import diffusers

    scheduler = getattr(diffusers, name)(**config)
    scheduler.set_timesteps(STEPS)
    return scheduler


def _ddim_by_hand(x: Tensor, m: Tensor, a: float, a_next: float) -> Tensor:
    clean = (x - math.sqrt(1 - a) * m) / math.sqrt(a)
    return math.sqrt(a_next) * clean + math.sqrt(1 - a_next) * m


def _ddim(device: torch.device, shape: tuple[int, ...], dtype: torch.dtype) -> Case:
    plan = plans.ddim(STEPS, clip_sample=False).to(device)
    a, a_next = _abar(plan, STEP)
    theirs = _scheduler("DDIMScheduler", clip_sample=False)
    runs = {
        "onepass": lambda x, m: onepass.denoise_step(x, m, plan, STEP),
        "eager": lambda x, m: _ddim_by_hand(x, m, a, a_next),
        "diffusers": theirs and (lambda x, m: theirs.step(m, int(plan.timesteps[STEP]), x, return_dict=False)[0]),
    }
    formula = "reads sample and model output, writes one"
    return _case("ddim", shape, dtype, 2, runs, _reference(plan, STEP), 2, 1, formula)


def _guided(device: torch.device, shape: tuple[int, ...]) -> Case:
    plan = plans.ddim(STEPS, clip_sample=False).to(device)
    a, a_next = _abar(plan, STEP)
    theirs = _scheduler("DDIMScheduler", clip_sample=False)
    mix = lambda u, c: u + GUIDANCE * (c - u)
    runs = {
        "onepass": lambda x, u, c: onepass.denoise_step(x, (u, c), plan, STEP, guidance=GUIDANCE),
        "eager": lambda x, u, c: _ddim_by_hand(x, mix(u, c), a, a_next),
        "diffusers": theirs
        and (lambda x, u, c: theirs.step(mix(u, c), int(plan.timesteps[STEP]), x, return_dict=False)[0]),
    }
    reference = lambda x, u, c: onepass.denoise_step(x, (u, c), plan, STEP, guidance=GUIDANCE, backend="reference")
    formula = "reads sample and two model outputs, writes one"
    return _case("ddim_guided", shape, torch.float32, 3, runs, reference, 3, 1, formula)


def _ddpm(device: torch.device, shape: tuple[int, ...]) -> Case:
    plan = plans.ddpm(STEPS).to(device)
    row = plans.plan.Row(*plan.table[STEP, :9].tolist())
    seeds = torch.arange(shape[0], device=device) + SEED
    theirs = _scheduler("DDPMScheduler")

    def by_hand(x: Tensor, m: Tensor, noise: Tensor) -> Tensor:
        clean = (row.p * x + row.q * m).clamp(-1, 1)
        return row.u * clean + row.x * x + row.z * noise

    def same_noise(x: Tensor, m: Tensor) -> Tensor:
        stream = (STREAM_TAG << 56) + STEP
        return by_hand(x, m, onepass.rng.normal(shape, seed=seeds, stream=stream, backend="reference").to(x.dtype))

    runs = {
        "onepass": lambda x, m: onepass.denoise_step(x, m, plan, STEP, seed=seeds),
        "eager": lambda x, m: by_hand(x, m, torch.randn_like(x)),
        "diffusers": theirs and (lambda x, m: theirs.step(m, plan.timesteps[STEP], x, return_dict=False)[0]),
    }
    return _case(
        "ddpm_clip_noise", shape, torch.float32, 2, runs, same_noise, 2, 1,
        "reads sample and model output, writes one; drawing the noise is not counted as FLOPs",
        yardstick=same_noise, uncompared=frozenset({"eager", "diffusers", COMPILED}),
    )


def _multistep(device: torch.device, shape: tuple[int, ...]) -> Case:
    plan = plans.dpmpp_2m(STEPS).to(device)
    row, history = plans.plan.Row(*plan.table[STEP, :9].tolist()), plan.table[STEP, 9].item()
    theirs = _scheduler("DPMSolverMultistepScheduler")

    def ours(x: Tensor, m: Tensor, h: Tensor, backend: str | None = None) -> tuple[Tensor, Tensor]:
        return onepass.denoise_step(x, m, plan, STEP, state=h.unsqueeze(1), backend=backend), h

    def by_hand(x: Tensor, m: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return row.x * x + row.m * m + history * h, row.p * x + row.q * m

    def diffusers(x: Tensor, m: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        theirs._step_index, theirs.lower_order_nums, theirs.model_outputs = STEP, 2, [None, h]
        return theirs.step(m, theirs.timesteps[STEP], x, return_dict=False)[0], theirs.model_outputs[-1]

    runs = {"onepass": ours, "eager": by_hand, "diffusers": theirs and diffusers}
    reference = lambda x, m, h: ours(x, m, h, "reference")
    formula = "reads sample, model output and history, writes the result and the history"
    return _case("dpmpp_2m", shape, torch.float32, 3, runs, reference, 3, 2, formula)


def _mixed(device: torch.device, shape: tuple[int, ...]) -> Case:
    """Every row at a step of its own, as a server has them; diffusers steps row by row."""
    plan = plans.ddim(STEPS, clip_sample=False).to(device)
    steps = torch.arange(shape[0], device=device) % STEPS
    rows = steps.tolist()
    a, a_next = (part.square().float().reshape(-1, 1, 1, 1) for part in plan.levels[steps].T[::2])
    theirs = _scheduler("DDIMScheduler", clip_sample=False)
    times = plan.timesteps.tolist()

    def by_hand(x: Tensor, m: Tensor) -> Tensor:
        clean = (x - (1 - a).sqrt() * m) / a.sqrt()
        return a_next.sqrt() * clean + (1 - a_next).sqrt() * m

    def diffusers(x: Tensor, m: Tensor) -> Tensor:
        each = zip(x.split(1), m.split(1), rows, strict=True)
        return torch.cat([theirs.step(b, times[row], a, return_dict=False)[0] for a, b, row in each])

    runs = {
        "onepass": lambda x, m: onepass.denoise_step(x, m, plan, steps),
        "eager": by_hand,
        "diffusers": theirs and diffusers,
    }
    formula = "reads sample and model output, writes one"
    return _case("ddim_mixed_steps", shape, torch.float32, 2, runs, _reference(plan, steps), 2, 1, formula)


def _reference(plan: DenoisePlan, step: int | Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, m: onepass.denoise_step(x, m, plan, step, backend="reference")
