"""Digits denoised by a class-conditional U-Net with classifier-free guidance, by two of diffusers' samplers."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import denoise_step, plans, rng
from . import checkpoints, pictures
from .models import CLASSES, Denoiser
from .workload import Bar, Figure, Result, Stopwatch, race

NAME = "diffusion"
TOLERANCE = 1e-3
_SEED = 3


@dataclass(frozen=True)
class Batch:
    """What is denoised in one go."""

    title: str
    scheduler: Callable[[], Any]        # diffusers' own, fresh: it counts its steps
    plan: plans.DenoisePlan             # the same sampler as a table
    steps: int
    start: Tensor                       # [B, 1, 8, 8]
    labels: Tensor                      # [B]
    guidance: Tensor                    # [B]
    noise: Tensor | None                # [steps, B, 1, 8, 8], where the sampler draws any
    options: dict[str, float]           # of the scheduler's step


def _predict(model: Denoiser, batch: Batch, x: Tensor, time: Tensor) -> Tensor:
    """The noise [2 B, 1, 8, 8] that the model sees without and with the label."""
    labels = torch.cat((torch.full_like(batch.labels, CLASSES), batch.labels))
    return model(torch.cat((x, x)), time.expand(2 * len(x)), labels)


def _stock(model: Denoiser, batch: Batch, op: Stopwatch) -> Tensor:
    scheduler = batch.scheduler()
    scheduler.set_timesteps(batch.steps, device=batch.start.device)
    weight = batch.guidance[:, None, None, None]
    x = batch.start
    for i, time in enumerate(scheduler.timesteps):
        output = _predict(model, batch, x, time)
        with op:
            uncond, cond = output.chunk(2)
            guided = uncond + weight * (cond - uncond)
            options: dict[str, Any] = dict(batch.options)
            if batch.noise is not None:
                options["variance_noise"] = batch.noise[i]
            x = scheduler.step(guided, time, x, return_dict=False, **options)[0]
    return x


def _onepass(model: Denoiser, batch: Batch, op: Stopwatch) -> Tensor:
    plan = batch.plan
    x = batch.start
    state = plan.new_state(x)
    for i, time in enumerate(plan.timesteps):
        output = _predict(model, batch, x, time)
        with op:
            noise = None if batch.noise is None else batch.noise[i]
            x = denoise_step(x, output, plan, i, state=state, guidance=batch.guidance, noise=noise)
    return x


def _batches(device: torch.device, quick: bool) -> list[Batch]:
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

    trained: dict[str, Any] = {
        "num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear",
    }
    ddim_steps, dpm_steps, many = (4, 3, 2) if quick else (40, 20, 12)
    guidance = torch.linspace(0, 4, 9, device=device)
    shape = (1, 8, 8)
    each = torch.arange(10, device=device)
    by_class = rng.normal((10, *shape), seed=_SEED, stream=2, device=device)
    return [
        Batch(
            title=f"DDIM with noise (eta 1), {ddim_steps} steps, guidance 2",
            scheduler=lambda: DDIMScheduler(**trained),
            plan=plans.ddim(ddim_steps, eta=1.0, **trained).to(device),
            steps=ddim_steps,
            start=rng.normal((10 * many, *shape), seed=_SEED, device=device),
            labels=each.repeat_interleave(many),
            guidance=torch.full((10 * many,), 2.0, device=device),
            noise=rng.normal((ddim_steps, 10 * many, *shape), seed=_SEED, stream=1, device=device),
            options={"eta": 1.0},
        ),
        Batch(
            title=f"DPM-Solver++ 2M, {dpm_steps} steps, guidance 0 to 4",
            scheduler=lambda: DPMSolverMultistepScheduler(timestep_spacing="trailing", **trained),
            plan=plans.dpmpp_2m(dpm_steps, timestep_spacing="trailing", **trained).to(device),
            steps=dpm_steps,
            start=by_class.repeat_interleave(9, dim=0),
            labels=each.repeat_interleave(9),
            guidance=guidance.repeat(10),
            noise=None,
            options={},
        ),
    ]


@torch.inference_mode()
def run(device: torch.device, bar: Bar, quick: bool = False) -> Result:
    model = Denoiser().to(device).eval()
    model.load_state_dict(checkpoints.load(NAME)[0])
    batches = _batches(device, quick)
    stock, onepass, stock_side, onepass_side = race(
        lambda op: [_stock(model, batch, op) for batch in batches],
        lambda op: [_onepass(model, batch, op) for batch in batches],
        device, bar, repeats=1 if quick else 7,
    )
    errors = [(a - b).abs().max().item() for a, b in zip(stock, onepass, strict=True)]
    steps = sum(batch.steps for batch in batches)
    return Result(
        name=NAME,
        what=f"{sum(len(batch.start) for batch in batches)} digits denoised by a U-Net with classifier-free guidance, "
             f"{steps} steps of two samplers",
        op="denoise_step",
        stock=stock_side,
        onepass=onepass_side,
        agrees=max(errors) < TOLERANCE,
        agreement=f"within {max(errors):.0e}",
        notes=[
            *(f"{batch.title}: a pixel differs by {error:.1e} at most."
              for batch, error in zip(batches, errors, strict=True)),
            f"A step with its guidance takes {stock_side.op.seconds / steps * 1e6:.0f} us in diffusers' schedulers and "
            f"{onepass_side.op.seconds / steps * 1e6:.0f} us in onepass; the U-Net's time is the same on both sides.",
        ],
        figures=[
            Figure(batches[0].title, "A row for each class.",
                   pictures.grid((onepass[0][:, 0] + 1) / 2, len(batches[0].start) // 10, 31), "image/png"),
            Figure(batches[1].title, "A row for each class, one noise a row; guidance grows to the right.",
                   pictures.grid((onepass[1][:, 0] + 1) / 2, 9, 34), "image/png"),
        ],
    )
