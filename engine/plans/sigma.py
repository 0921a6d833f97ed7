"""Samplers that think in sigma: Euler, Euler ancestral, and Euler for flow matching."""
from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from .._checks import one_of
from .plan import DenoisePlan, Level, Row
from .schedule import (
    Array,
    alphas_bar,
    check_begin,
    check_steps,
    last_sigma,
    prediction,
    sigma_to_timestep,
    spread,
    timesteps,
    training_sigmas,
)


def euler(
    steps: int,
    *,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
    sigma_schedule: str | None = None,
    final_sigmas_type: str = "zero",
    prediction_type: str = "epsilon",
    timestep_spacing: str = "linspace",
    steps_offset: int = 0,
    num_train_timesteps: int = 1000,
    beta_schedule: str = "linear",
    beta_start: float = 0.0001,
    beta_end: float = 0.02,
    trained_betas: Sequence[float] | None = None,
    rescale_betas_zero_snr: bool = False,
    begin: int = 0,
) -> DenoisePlan:
    """Karras et al. 2022 (arXiv:2206.00364), algorithm 2 without its second-order correction.

    Options are named as in diffusers' EulerDiscreteScheduler; `sigma_schedule` is None, "karras" or "exponential".
    The sample is clean + sigma * noise; the model is fed `plan.scale_input(sample, step)`.
    """
    kind = prediction(prediction_type)
    abar = alphas_bar(num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas, rescale_betas_zero_snr)
    training = training_sigmas(abar, rescale_betas_zero_snr)
    times = timesteps(steps, num_train_timesteps, timestep_spacing, steps_offset)
    check_begin(begin, steps)
    sigmas: Array = np.interp(times, np.arange(len(training)), training)
    if sigma_schedule is not None:
        sigmas = spread(sigma_schedule, sigmas[0], sigmas[-1], steps)
        times = sigma_to_timestep(sigmas, training)
    path = [*map(float, sigmas), last_sigma(final_sigmas_type, training)]
    rows = []
    for i in range(begin, steps):
        sigma = path[i]
        gamma = min(s_churn / steps, math.sqrt(2) - 1) if s_tmin <= sigma <= s_tmax else 0.0
        lifted = sigma * (1 + gamma)
        row = _euler_row(kind, sigma, lifted, path[i + 1] / lifted)
        rows.append(row._replace(z=row.x * s_noise * math.sqrt(lifted**2 - sigma**2), number=i))
    return _in_sigma_space("euler", rows, times, path, timestep_spacing, begin)


def euler_ancestral(
    steps: int,
    *,
    prediction_type: str = "epsilon",
    timestep_spacing: str = "linspace",
    steps_offset: int = 0,
    num_train_timesteps: int = 1000,
    beta_schedule: str = "linear",
    beta_start: float = 0.0001,
    beta_end: float = 0.02,
    trained_betas: Sequence[float] | None = None,
    rescale_betas_zero_snr: bool = False,
    begin: int = 0,
) -> DenoisePlan:
    """Euler to sigma_down, then noise of sigma_up: the ancestral sampler of k-diffusion (Crowson 2022).

    Options are named as in diffusers' EulerAncestralDiscreteScheduler.
    """
    kind = prediction(prediction_type)
    abar = alphas_bar(num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas, rescale_betas_zero_snr)
    training = training_sigmas(abar, rescale_betas_zero_snr)
    times = timesteps(steps, num_train_timesteps, timestep_spacing, steps_offset)
    check_begin(begin, steps)
    path = [*map(float, np.interp(times, np.arange(len(training)), training)), 0.0]
    rows = []
    for i in range(begin, steps):
        sigma, target = path[i], path[i + 1]
        up = target * math.sqrt(sigma**2 - target**2) / sigma
        down = target**2 / sigma                     # sqrt(target^2 - up^2)
        rows.append(_euler_row(kind, sigma, sigma, down / sigma)._replace(z=up, number=i))
    return _in_sigma_space("euler_ancestral", rows, times, path, timestep_spacing, begin)


def flow_match_euler(
    steps: int | None = None,
    *,
    sigmas: Sequence[float] | None = None,
    shift: float = 1.0,
    mu: float | None = None,
    time_shift_type: str = "exponential",
    shift_terminal: float | None = None,
    sigma_schedule: str | None = None,
    invert_sigmas: bool = False,
    stochastic_sampling: bool = False,
    num_train_timesteps: int = 1000,
    begin: int = 0,
) -> DenoisePlan:
    """Euler along a rectified flow, x' = x + (sigma' - sigma) m (Esser et al. 2024, arXiv:2403.03206).

    Options are named as in diffusers' FlowMatchEulerDiscreteScheduler. Give `steps`, or your own falling `sigmas`
    in (0, 1]. `mu` switches the shift that depends on resolution on, and then `shift` is not used. The sample is
    (1 - sigma) clean + sigma * noise.
    """
    one_of("time_shift_type", time_shift_type, ("exponential", "linear"))
    if (steps is None) == (sigmas is None):
        raise ValueError(f"steps={steps} and sigmas={sigmas}: expected exactly one of the two")
    if not shift > 0:
        raise ValueError(f"shift={shift}, expected a number above 0")
    if sigmas is not None:
        out: Array = np.asarray(sigmas, dtype=np.float64)
        if out.ndim != 1 or not len(out) or not ((out > 0) & (out <= 1)).all():
            raise ValueError(f"sigmas={sigmas}, expected a sequence of numbers above 0 and at most 1")
    else:
        assert steps is not None
        check_steps(steps, num_train_timesteps)
        lowest = 1 / num_train_timesteps
        if mu is None:                               # the lowest training sigma is a shifted one already
            lowest = shift * lowest / (1 + (shift - 1) * lowest)
        out = np.linspace(1.0, lowest, steps)
    check_begin(begin, len(out))
    if mu is None:
        out = shift * out / (1 + (shift - 1) * out)
    else:
        strength = math.exp(mu) if time_shift_type == "exponential" else mu
        out = strength / (strength + (1 / out - 1))
    if shift_terminal is not None:
        if not 0 <= shift_terminal < 1 or out[-1] >= 1:
            raise ValueError(f"shift_terminal={shift_terminal} with a last sigma of {out[-1]:g}: "
                             "expected 0 <= shift_terminal < 1 and a last sigma below 1")
        out = 1 - (1 - out) * (1 - shift_terminal) / (1 - out[-1])
    if sigma_schedule is not None:
        out = spread(sigma_schedule, out[0], out[-1], len(out))
    path = [*map(float, out), 0.0]
    if invert_sigmas:
        path = [1 - sigma for sigma in path]
    rows = []
    for i in range(begin, len(out)):
        sigma, target = path[i], path[i + 1]
        if stochastic_sampling:
            rows.append(Row(x=1 - target, m=-(1 - target) * sigma, z=target, number=i))
        else:
            rows.append(Row(x=1.0, m=target - sigma, number=i))
    times = torch.tensor([sigma * num_train_timesteps for sigma in path[begin:-1]], dtype=torch.float32)
    levels = [Level(s, 1 - s) if invert_sigmas else Level(1 - s, s) for s in path[begin:]]
    return DenoisePlan.build("flow_match_euler", rows, times, levels)


def _euler_row(kind: str, sigma: float, lifted: float, ratio: float) -> Row:
    """prev = r x + (1 - r) clean, clean = p x + q m; a lifted (churned) sigma reaches epsilon only."""
    if kind == "epsilon":                            # p = 1, so that x keeps exactly 1
        return Row(x=1.0, m=(ratio - 1) * lifted)
    if kind == "v":
        p, q = 1 / (sigma**2 + 1), -sigma / math.sqrt(sigma**2 + 1)
        return Row(x=ratio + (1 - ratio) * p, m=(1 - ratio) * q)
    return Row(x=ratio, m=1 - ratio)


def _in_sigma_space(
    name: str, rows: list[Row], times: Array, path: list[float], timestep_spacing: str, begin: int
) -> DenoisePlan:
    top = max(path)
    return DenoisePlan.build(
        name, rows, torch.tensor(times[begin:].copy(), dtype=torch.float32), [Level(1.0, s) for s in path[begin:]],
        input_scale=[1 / math.sqrt(s**2 + 1) for s in path[begin:-1]],
        init_noise_sigma=math.sqrt(top**2 + 1) if timestep_spacing == "leading" else top)
