"""Noise schedules in float64: betas, timesteps and sigmas. Names and defaults are those of diffusers' configs."""
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .._checks import one_of

Array = npt.NDArray[np.floating[Any]]

_PREDICTIONS = {"epsilon": "epsilon", "v": "v", "v_prediction": "v", "sample": "sample", "flow": "flow",
                "flow_prediction": "flow"}


def prediction(prediction_type: str, allowed: Sequence[str] = ("epsilon", "v", "sample")) -> str:
    """The short name of a prediction type."""
    return one_of("prediction_type", _PREDICTIONS.get(prediction_type, prediction_type), allowed)


def alphas_bar(
    num_train_timesteps: int,
    beta_start: float,
    beta_end: float,
    beta_schedule: str,
    trained_betas: Sequence[float] | None,
    rescale_betas_zero_snr: bool,
) -> Array:
    """abar_t = prod_{s <= t} (1 - beta_s), [num_train_timesteps].

    The cosine is Nichol and Dhariwal 2021 (arXiv:2102.09672), eq. 17; zero terminal SNR is Lin et al. 2023
    (arXiv:2305.08891), algorithm 1.
    """
    n = num_train_timesteps
    if trained_betas is not None:
        betas = np.asarray(trained_betas, dtype=np.float64)
        if betas.shape != (n,):
            raise ValueError(f"trained_betas has shape {betas.shape}, expected num_train_timesteps = ({n},)")
    elif beta_schedule == "linear":
        betas = np.linspace(beta_start, beta_end, n)
    elif beta_schedule == "scaled_linear":
        betas = np.linspace(math.sqrt(beta_start), math.sqrt(beta_end), n) ** 2
    else:
        one_of("beta_schedule", beta_schedule, ("linear", "scaled_linear", "squaredcos_cap_v2"))
        curve = np.cos((np.arange(n + 1) / n + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = np.minimum(1 - curve[1:] / curve[:-1], 0.999)
    if not ((betas > 0) & (betas < 1)).all():
        raise ValueError(f"betas run from {betas.min():g} to {betas.max():g}, expected 0 < beta < 1")
    abar = np.cumprod(1 - betas)
    if rescale_betas_zero_snr:
        root = np.sqrt(abar)
        abar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return abar


def timesteps(steps: int, n: int, spacing: str, offset: int) -> Array:
    """Training timesteps in falling order, [steps], not rounded where the spacing is linspace.

    Table 2 of Lin et al. 2023 (arXiv:2305.08891).
    """
    check_steps(steps, n)
    if spacing == "linspace":
        return np.linspace(0, n - 1, steps)[::-1]
    if spacing == "leading":
        out = np.arange(steps)[::-1] * (n // steps) + float(offset)
    else:
        one_of("timestep_spacing", spacing, ("leading", "trailing", "linspace"))
        out = np.round(np.arange(n, 0, -n / steps)) - 1
    if out[0] > n - 1:
        raise ValueError(f"steps_offset={offset} leads to timestep {out[0]:g}, expected at most {n - 1}")
    return out


def check_steps(steps: int, n: int) -> None:
    if not 1 <= steps <= n:
        raise ValueError(f"steps={steps}, expected 1 .. num_train_timesteps = {n}")


def check_begin(begin: int, steps: int) -> None:
    if not 0 <= begin < steps:
        raise ValueError(f"begin={begin}, expected 0 .. {steps - 1} for {steps} steps")


def training_sigmas(abar: Array, zero_snr: bool) -> Array:
    """sqrt((1 - abar) / abar), [n], rising. A last abar of 0 is lifted to 2^-24: sigma stays finite."""
    if zero_snr:
        abar = np.append(abar[:-1], 2.0**-24)
    return np.sqrt((1 - abar) / abar)


def spread(kind: str, first: float, last: float, steps: int) -> Array:
    """Sigmas from `first` down to `last`, [steps]: "karras" (arXiv:2206.00364, eq. 5, rho = 7) or "exponential"."""
    if kind == "exponential":
        return np.exp(np.linspace(math.log(first), math.log(last), steps))
    one_of("sigma_schedule", kind, ("karras", "exponential"))
    rho = 7.0
    return (first ** (1 / rho) + np.linspace(0, 1, steps) * (last ** (1 / rho) - first ** (1 / rho))) ** rho


def sigma_to_timestep(sigmas: Array, training: Array) -> Array:
    """The fractional training timestep whose sigma each one is, log-linear between neighbours."""
    return np.interp(np.log(np.maximum(sigmas, 1e-10)), np.log(training), np.arange(len(training)))


def last_sigma(final_sigmas_type: str, training: Array) -> float:
    one_of("final_sigmas_type", final_sigmas_type, ("zero", "sigma_min"))
    return 0.0 if final_sigmas_type == "zero" else float(training[0])
