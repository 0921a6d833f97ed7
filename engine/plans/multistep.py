"""Samplers that look back: DPM-Solver++ of second order, and its stochastic form."""
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
    training_sigmas,
)


def dpmpp_2m(
    steps: int,
    *,
    solver_order: int = 2,
    algorithm_type: str = "dpmsolver++",
    solver_type: str = "midpoint",
    lower_order_final: bool = True,
    euler_at_final: bool = False,
    sigma_schedule: str | None = None,
    final_sigmas_type: str = "zero",
    lambda_min_clipped: float = -math.inf,
    flow_shift: float = 1.0,
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
    """Lu et al. 2022 (arXiv:2211.01095), algorithm 2; "sde-dpmsolver++" is its appendix on SDEs.

    Options are named as in diffusers' DPMSolverMultistepScheduler; `sigma_schedule` is None, "karras" or
    "exponential", and prediction_type "flow" takes the sigmas of a rectified flow with `flow_shift`. The history
    starts at row `begin`, which is therefore of first order.
    """
    kind = prediction(prediction_type, ("epsilon", "v", "sample", "flow"))
    one_of("solver_order", solver_order, (1, 2))
    one_of("algorithm_type", algorithm_type, ("dpmsolver++", "sde-dpmsolver++"))
    one_of("solver_type", solver_type, ("midpoint", "heun"))
    if kind == "flow" and sigma_schedule is not None:
        raise ValueError(f"sigma_schedule={sigma_schedule!r} with prediction_type 'flow', expected None")
    abar = alphas_bar(num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas, rescale_betas_zero_snr)
    training = training_sigmas(abar, rescale_betas_zero_snr)
    check_steps(steps, num_train_timesteps)
    sigmas: Array
    if kind == "flow":
        sigmas = 1 - np.linspace(1, 1 / num_train_timesteps, steps + 1)[:0:-1]
        sigmas = flow_shift * sigmas / (1 + (flow_shift - 1) * sigmas)
        times = np.trunc(sigmas * num_train_timesteps)
    elif sigma_schedule is not None:
        sigmas = spread(sigma_schedule, training[-1], training[0], steps)
        times = sigma_to_timestep(sigmas, training)
        if sigma_schedule == "karras" and beta_schedule != "squaredcos_cap_v2":
            times = np.round(times)
    else:
        usable = num_train_timesteps - int(np.searchsorted(-np.log(training[::-1]), lambda_min_clipped))
        times = _timesteps(steps, num_train_timesteps, usable, timestep_spacing, steps_offset)
        sigmas = np.interp(times, np.arange(len(training)), training)
    steps = len(sigmas)
    check_begin(begin, steps)
    path = [*map(float, sigmas), last_sigma(final_sigmas_type, training)]
    levels = [_level(kind, sigma) for sigma in path]
    first_order_last = euler_at_final or final_sigmas_type == "zero" or (lower_order_final and steps < 15)
    second = [solver_order == 2 and i > begin and not (i == steps - 1 and first_order_last) for i in range(steps)]
    rows = []
    for i in range(begin, steps):
        before = levels[i - 1] if second[i] else None
        row = _row(before, levels[i], levels[i + 1], algorithm_type, solver_type)
        p, q = _clean(kind, path[i], levels[i])
        # u's share goes to x and m: where the signal is weak u is huge, and float32 would cancel.
        row = row._replace(x=row.x + row.u * p, m=row.u * q, u=0.0)
        if i + 1 < steps and second[i + 1]:
            row = row._replace(p=p, q=q, slot=0)
        rows.append(row._replace(number=i, history=row.history or (0.0,) * any(second)))
    return DenoisePlan.build("dpmpp_2m", rows, torch.tensor([int(t) for t in times[begin:]]), levels[begin:])


def _timesteps(steps: int, n: int, usable: int, spacing: str, offset: int) -> Array:
    """As `schedule.timesteps`, but of steps + 1 points of which the last is not used, and within `usable`."""
    if spacing == "linspace":
        return np.round(np.linspace(0, usable - 1, steps + 1))[:0:-1]
    if spacing == "leading":
        return np.arange(steps, 0, -1) * (usable // (steps + 1)) + float(offset)
    one_of("timestep_spacing", spacing, ("leading", "trailing", "linspace"))
    return np.round(np.arange(usable, 0, -n / steps)) - 1


def _level(kind: str, sigma: float) -> Level:
    if kind == "flow":
        return Level(1 - sigma, sigma)
    signal = 1 / math.sqrt(sigma**2 + 1)
    return Level(signal, sigma * signal)


def _clean(kind: str, sigma: float, level: Level) -> tuple[float, float]:
    """(p, q) of the clean sample p x + q m."""
    a, s = level
    return {"epsilon": (1 / a if a else math.inf, -s / a if a else -math.inf), "v": (a, -s), "sample": (0.0, 1.0),
            "flow": (1.0, -sigma)}[kind]


def _log_snr(level: Level) -> float:
    return math.log(level.signal) - math.log(level.noise) if level.noise else math.inf


def _row(before: Level | None, level: Level, after: Level, algorithm: str, solver: str) -> Row:
    """From `level` to `after`; of second order where the level `before` is known. u is the clean sample."""
    h = _log_snr(after) - _log_snr(level)
    stochastic = algorithm == "sde-dpmsolver++"
    decay = math.exp(-2 * h) if stochastic else math.exp(-h)
    x = after.noise / level.noise * (math.exp(-h) if stochastic else 1.0)
    k0 = after.signal * (1 - decay)
    z = after.noise * math.sqrt(1 - decay) if stochastic else 0.0
    if before is None:
        return Row(x=x, u=k0, z=z)
    rate = 2 if stochastic else 1
    k1 = k0 / 2 if solver == "midpoint" else after.signal * (1 - (1 - decay) / (rate * h))
    slope = k1 * h / (_log_snr(level) - _log_snr(before))
    return Row(x=x, u=k0 + slope, z=z, history=(-slope,))
