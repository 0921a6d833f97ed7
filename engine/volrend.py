"""Volume rendering: colors, depth, opacity, weights and distortion of rays in one pass over their samples."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _checks as check
from ._ops import keep, recall, route, signature
from .reference.volrend import DEPTHS, offsets_error


class Rendering(NamedTuple):
    """What `composite` returns, by ray."""

    features: Tensor  # [n_rays, N], dtype of features
    depth: Tensor  # [n_rays], dtype of t_starts, in its units
    opacity: Tensor  # [n_rays], dtype of sigmas or alphas
    weights: Tensor | None  # as the samples, dtype of sigmas or alphas; None unless asked for
    distortion: Tensor | None  # [n_rays], dtype of t_starts; None unless asked for


def composite(
    sigmas: Tensor | None,  # [n_rays, n_samples], or [total] with ray_offsets: density per unit of t; None with alphas
    features: Tensor,  # [n_rays, n_samples, N] or [total, N]: colors or any other channels
    t_starts: Tensor,  # as sigmas: where each sample begins on its ray
    t_ends: Tensor,  # as sigmas, dtype of t_starts: where it ends
    *,
    alphas: Tensor | None = None,  # as sigmas: opacities, instead of sigmas
    ray_offsets: Tensor | None = None,  # [n_rays + 1] int64: ray r owns samples ray_offsets[r] to ray_offsets[r + 1]
    background: Tensor | None = None,  # [N] or [n_rays, N]: what lies behind the samples
    early_stop_eps: float = 0.0,  # samples with less light left in front of them are left out; 0: none
    prefix_trans: Tensor | None = None,  # [n_rays]: light left in front of the first sample; None: 1
    depth: str = "expected",  # "expected": sum w m; "normalized": that over the opacity; "median"
    return_weights: bool = False,
    distortion: bool = False,
    out: Rendering | tuple[Tensor | None, ...] | None = None,  # tensors to fill, in the order of the result
    backend: str | None = None,
) -> Rendering:
    """Composites the samples of every ray, front to back (N. Max, 1995; the distortion is that of Mip-NeRF 360).

    alpha_i = 1 - exp(-sigma_i (t_ends_i - t_starts_i)), T_1 = prefix_trans, w_i = T_i alpha_i, T_{i+1} = T_i - w_i.
    features = sum w_i c_i + T_end background; opacity = sum w_i; m_i is the middle of a sample. Sample i counts if and
    only if T_i >= early_stop_eps. T_end is the light that is left: prefix_trans - opacity, so 1 - opacity without one.

    "normalized" divides by max(opacity, 2^-23). "median" is the middle of the first sample behind which T is at most
    1/2, of the last one that counts where there is none, 0 where none counts; it has no gradient. distortion =
    sum_ij w_i w_j |m_i - m_j| + 1/3 sum w_i^2 delta_i, for samples in ascending order of t.

    Gradients flow to sigmas or alphas, features, t_starts, t_ends, background and prefix_trans; they are exact at
    alpha = 1, and 0 for samples that do not count, whatever these hold. A ray's result does not depend on other rays.
    dtypes: float32, bfloat16, float16 (float64: reference), which may differ between tensors; sums are in float32.

    Raises ValueError or TypeError where shapes, dtypes, devices or options do not fit, and where ray_offsets on the
    CPU do not ascend from 0 to the number of samples.
    """
    given = signature(
        "composite", sigmas, features, t_starts, t_ends, alphas, ray_offsets, background, early_stop_eps, prefix_trans,
        depth, return_weights, distortion, tuple(out) if isinstance(out, tuple) else out, backend,
    )
    if (run := recall(given)) is None:
        _check(
            sigmas, features, t_starts, t_ends, alphas, ray_offsets, background, early_stop_eps, prefix_trans, depth,
            return_weights, distortion, out,
        )
    if ray_offsets is not None:
        _check_offsets(ray_offsets, features.shape[0])
    args = (
        sigmas, features, t_starts, t_ends, alphas, ray_offsets, background, prefix_trans, float(early_stop_eps), depth,
        return_weights, distortion,
    )
    if run is None:
        run = route("composite", args, backend)
        keep(given, run)
    color, expected, opacity, weights, spread = run(*args) if out is None else run(*args, out=tuple(out))
    return Rendering(color, expected, opacity, weights if return_weights else None, spread if distortion else None)


def _check(
    sigmas: Tensor | None, features: Tensor, t_starts: Tensor, t_ends: Tensor, alphas: Tensor | None,
    ray_offsets: Tensor | None, background: Tensor | None, early_stop_eps: float, prefix_trans: Tensor | None,
    depth: str, return_weights: bool, distortion: bool, out: Any,
) -> None:
    if (sigmas is None) == (alphas is None):
        given = "neither is" if sigmas is None else "both are"
        raise ValueError(f"sigmas and alphas: {given} given, expected exactly one of them")
    name, density = ("alphas", alphas) if sigmas is None else ("sigmas", sigmas)
    check.is_float_tensor(name, density)
    assert density is not None
    n_rays = _check_samples(name, density, ray_offsets)
    for other, x in (("features", features), ("t_starts", t_starts), ("t_ends", t_ends)):
        check.is_float_tensor(other, x)
        _is_on(other, x, name, density)
    if features.dim() != density.dim() + 1 or features.shape[:-1] != density.shape:
        raise ValueError(
            f"features has shape {tuple(features.shape)}, expected that of {name} and channels, "
            f"{(*density.shape, 'N')}".replace("'", "")
        )
    if t_starts.shape != density.shape:
        raise ValueError(
            f"t_starts has shape {tuple(t_starts.shape)}, expected that of {name}, {tuple(density.shape)}"
        )
    check.is_like("t_ends", t_ends, "t_starts", t_starts)
    channels = features.shape[-1]
    if background is not None:
        check.is_float_tensor("background", background)
        _is_on("background", background, name, density)
        if tuple(background.shape) not in ((channels,), (n_rays, channels)):
            raise ValueError(
                f"background has shape {tuple(background.shape)}, expected ({channels},) or ({n_rays}, {channels})"
            )
    if prefix_trans is not None:
        check.is_float_tensor("prefix_trans", prefix_trans)
        _is_on("prefix_trans", prefix_trans, name, density)
        if tuple(prefix_trans.shape) != (n_rays,):
            raise ValueError(f"prefix_trans has shape {tuple(prefix_trans.shape)}, expected ({n_rays},)")
    if isinstance(early_stop_eps, bool) or not isinstance(early_stop_eps, (int, float)):
        raise TypeError(f"early_stop_eps is {type(early_stop_eps).__name__}, expected a float")
    if not 0 <= early_stop_eps <= 1:
        raise ValueError(f"early_stop_eps={early_stop_eps}: expected 0 <= early_stop_eps <= 1")
    check.one_of("depth", depth, DEPTHS)
    wanted = (True, True, True, return_weights, distortion)
    if out is not None:
        shapes = ((n_rays, channels), (n_rays,), (n_rays,), tuple(density.shape), (n_rays,))
        dtypes = (features.dtype, t_starts.dtype, density.dtype, density.dtype, t_starts.dtype)
        _check_out(out, wanted, shapes, dtypes, density.device)


def _check_samples(name: str, density: Tensor, ray_offsets: Tensor | None) -> int:
    """The number of rays."""
    if ray_offsets is None:
        if density.dim() != 2:
            got = tuple(density.shape)
            raise ValueError(f"{name} has shape {got}, expected (n_rays, n_samples) without ray_offsets")
        return density.shape[0]
    if density.dim() != 1:
        raise ValueError(f"{name} has shape {tuple(density.shape)}, expected (total,) with ray_offsets")
    if not isinstance(ray_offsets, Tensor):
        raise TypeError(f"ray_offsets is {type(ray_offsets).__name__}, expected an int64 tensor")
    if ray_offsets.dtype != torch.int64:
        raise TypeError(f"ray_offsets has dtype {ray_offsets.dtype}, expected torch.int64")
    if ray_offsets.dim() != 1 or ray_offsets.shape[0] < 1:
        raise ValueError(f"ray_offsets has shape {tuple(ray_offsets.shape)}, expected (n_rays + 1,)")
    _is_on("ray_offsets", ray_offsets, name, density)
    return ray_offsets.shape[0] - 1


def _check_offsets(ray_offsets: Tensor, total: int) -> None:
    """Of a device's offsets the values, where they may be read: the kernels cut off what is out of range. In host
    memory the implementations look at them, once."""
    device = not check.on_host(ray_offsets) and check.checkable(ray_offsets)
    if device and (why := offsets_error(ray_offsets.cpu(), total)):
        raise ValueError(why)


def _is_on(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.device != other.device:
        raise ValueError(f"{name} is on {x.device}, expected the device of {other_name}, {other.device}")


def _check_out(out: Any, wanted: tuple[bool, ...], shapes: Any, dtypes: Any, device: torch.device) -> None:
    if not isinstance(out, tuple) or len(out) != 5:
        got = f"{len(out)} values" if isinstance(out, tuple) else type(out).__name__
        raise TypeError(f"out is {got}, expected a Rendering or a tuple of its 5 tensors")
    for field, x, want, shape, dtype in zip(Rendering._fields, out, wanted, shapes, dtypes, strict=True):
        if x is not None and not want:
            raise ValueError(f"out.{field} is given, expected None: {field} was not asked for")
        check.is_out(x, shape, dtype, device, f"out.{field}")


__all__ = ["Rendering", "composite"]
