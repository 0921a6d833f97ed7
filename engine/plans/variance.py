"""Samplers that think in alpha-bar: DDIM, DDPM, LCM. The sample is sqrt(abar) clean + sqrt(1 - abar) noise."""
from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from .._checks import one_of
from .plan import DenoisePlan, Level, Row
from .schedule import alphas_bar, check_begin, check_steps, prediction, timesteps


def ddim(
    steps: int,
    *,
    eta: float = 0.0,
    prediction_type: str = "epsilon",
    clip_sample: bool = True,
    clip_sample_range: float = 1.0,
    use_clipped_model_output: bool = False,
    set_alpha_to_one: bool = True,
    timestep_spacing: str = "leading",
    steps_offset: int = 0,
    num_train_timesteps: int = 1000,
    beta_schedule: str = "linear",
    beta_start: float = 0.0001,
    beta_end: float = 0.02,
    trained_betas: Sequence[float] | None = None,
    rescale_betas_zero_snr: bool = False,
    begin: int = 0,
) -> DenoisePlan:
    """Song et al. 2020 (arXiv:2010.02502), eq. 12 and 16. Options are named as in diffusers' DDIMScheduler.

    `begin` leaves out the rows before it, as image-to-image does.
    """
    kind = prediction(prediction_type)
    abar = alphas_bar(num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas, rescale_betas_zero_snr)
    times = _rounded(steps, num_train_timesteps, timestep_spacing, steps_offset)
    check_begin(begin, steps)
    limit = clip_sample_range if clip_sample else math.inf
    final = 1.0 if set_alpha_to_one else float(abar[0])
    stride = num_train_timesteps // steps            # whatever the spacing, as in the original code
    before = [float(abar[t]) for t in times]
    after = [float(abar[t - stride]) if t >= stride else final for t in times]
    rows = []
    for i in range(begin, len(times)):
        a, a_next = before[i], after[i]
        std = eta * math.sqrt(max((1 - a_next) / (1 - a) * (1 - a / a_next), 0.0))
        noise = math.sqrt(max(1 - a_next - std**2, 0.0))
        p, q, p_eps, q_eps = _clean_and_noise(kind, a)
        row = Row(u=math.sqrt(a_next), x=noise * p_eps, m=noise * q_eps, p=p, q=q, z=std, limit=limit, number=i)
        if use_clipped_model_output:                 # the noise is what the clamped clean sample leaves
            row = row._replace(u=row.u - noise * math.sqrt(a / (1 - a)), x=noise / math.sqrt(1 - a), m=0.0)
        rows.append(_fold(row))
    levels = [*map(_level, before[begin:]), _level(after[-1])]
    return DenoisePlan.build("ddim", rows, torch.tensor(times[begin:]), levels)


def ddpm(
    steps: int,
    *,
    variance_type: str = "fixed_small",
    prediction_type: str = "epsilon",
    clip_sample: bool = True,
    clip_sample_range: float = 1.0,
    timestep_spacing: str = "leading",
    steps_offset: int = 0,
    num_train_timesteps: int = 1000,
    beta_schedule: str = "linear",
    beta_start: float = 0.0001,
    beta_end: float = 0.02,
    trained_betas: Sequence[float] | None = None,
    rescale_betas_zero_snr: bool = False,
    begin: int = 0,
) -> DenoisePlan:
    """Ho et al. 2020 (arXiv:2006.11239), eq. 7. Options are named as in diffusers' DDPMScheduler.

    `variance_type` is "fixed_small" (the posterior's variance) or "fixed_large" (beta). Learned variances differ
    from element to element, which a table of rows cannot hold.
    """
    kind = prediction(prediction_type)
    one_of("variance_type", variance_type, ("fixed_small", "fixed_large"))
    abar = alphas_bar(num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas, rescale_betas_zero_snr)
    times = _rounded(steps, num_train_timesteps, timestep_spacing, steps_offset)
    check_begin(begin, steps)
    limit = clip_sample_range if clip_sample else math.inf
    path = [*(float(abar[t]) for t in times), 1.0]
    rows = []
    for i in range(begin, len(times)):
        a, a_next = path[i], path[i + 1]
        beta = 1 - a / a_next
        variance = beta if variance_type == "fixed_large" else (1 - a_next) / (1 - a) * beta
        p, q, _, _ = _clean_and_noise(kind, a)
        rows.append(_fold(Row(
            u=math.sqrt(a_next) * beta / (1 - a),
            x=math.sqrt(a / a_next) * (1 - a_next) / (1 - a),
            z=math.sqrt(variance) if times[i] > 0 else 0.0,
            p=p, q=q, limit=limit, number=i)))
    return DenoisePlan.build("ddpm", rows, torch.tensor(times[begin:]), [*map(_level, path[begin:])])


def lcm(
    steps: int,
    *,
    original_inference_steps: int = 50,
    prediction_type: str = "epsilon",
    clip_sample: bool = False,
    clip_sample_range: float = 1.0,
    timestep_scaling: float = 10.0,
    num_train_timesteps: int = 1000,
    beta_schedule: str = "scaled_linear",
    beta_start: float = 0.00085,
    beta_end: float = 0.012,
    trained_betas: Sequence[float] | None = None,
    rescale_betas_zero_snr: bool = False,
    begin: int = 0,
) -> DenoisePlan:
    """Luo et al. 2023 (arXiv:2310.04378), algorithm 2. Options are named as in diffusers' LCMScheduler."""
    kind = prediction(prediction_type)
    check_steps(original_inference_steps, num_train_timesteps)
    if not 1 <= steps <= original_inference_steps:
        raise ValueError(f"steps={steps}, expected 1 .. original_inference_steps = {original_inference_steps}")
    check_begin(begin, steps)
    abar = alphas_bar(num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas, rescale_betas_zero_snr)
    trained = np.arange(original_inference_steps, 0, -1) * (num_train_timesteps // original_inference_steps) - 1
    picks = np.floor(np.linspace(0, original_inference_steps, steps, endpoint=False)).astype(np.int64)
    times = [int(t) for t in trained[picks]]
    limit = clip_sample_range if clip_sample else math.inf
    path = [*(float(abar[t]) for t in times), 1.0]   # the last step returns the clean sample
    rows = []
    for i in range(begin, len(times)):
        a_next = path[i + 1]
        scaled = timestep_scaling * times[i]
        skip, keep = 0.25 / (scaled**2 + 0.25), scaled / math.sqrt(scaled**2 + 0.25)
        p, q, _, _ = _clean_and_noise(kind, path[i])
        signal, noise = _level(a_next)
        rows.append(_fold(Row(u=signal * keep, x=signal * skip, z=noise, p=p, q=q, limit=limit, number=i)))
    return DenoisePlan.build("lcm", rows, torch.tensor(times[begin:]), [*map(_level, path[begin:])])


def _rounded(steps: int, n: int, spacing: str, offset: int) -> list[int]:
    return [int(t) for t in np.round(timesteps(steps, n, spacing, offset))]


def _level(abar: float) -> Level:
    return Level(math.sqrt(abar), math.sqrt(1 - abar))


def _clean_and_noise(kind: str, abar: float) -> tuple[float, float, float, float]:
    """(p, q, p', q'): the clean sample is p x + q m, the noise p' x + q' m."""
    a, s = _level(abar)
    if kind == "epsilon":
        return (1 / a, -s / a, 0.0, 1.0) if a > 0 else (math.inf, -math.inf, 0.0, 1.0)
    if kind == "v":
        return a, -s, s, a
    return 0.0, 1.0, 1 / s, -a / s


def _fold(row: Row) -> Row:
    """Without a clamp u is affine in x and m, so its share goes to them."""
    if row.limit < math.inf:
        return row
    return row._replace(x=row.x + row.u * row.p, m=row.m + row.u * row.q, u=0.0, p=0.0, q=0.0)
