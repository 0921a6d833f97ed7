"""Paths between latents: straight lines and great circles."""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _checks as check

_PARALLEL = 1e-4        # radians from 0 or from pi inside which the direction of a great circle is lost in rounding


def _operands(
    start: Tensor, end: Tensor, weight: float | Tensor
) -> tuple[Tensor, Tensor, Tensor]:     # in float32 at least; weight [] or [B, 1, ...]
    check.is_float_tensor("start", start)
    check.is_like("end", end, "start", start)
    kind = torch.float64 if start.dtype == torch.float64 else torch.float32
    if isinstance(weight, Tensor):
        rows = start.shape[0] if start.dim() else 1
        if not weight.is_floating_point():
            raise TypeError(f"weight has dtype {weight.dtype}, expected a number or a float tensor")
        if weight.device != start.device:
            raise ValueError(f"weight is on {weight.device}, expected the device of start, {start.device}")
        if tuple(weight.shape) not in ((), (rows,)):
            raise ValueError(f"weight has shape {tuple(weight.shape)}, expected () or ({rows},)")
        t = weight.to(kind)
        t = t.reshape(-1, *(1,) * (start.dim() - 1)) if weight.dim() and start.dim() else t.reshape(())
    elif isinstance(weight, (int, float)) and not isinstance(weight, bool):
        t = torch.tensor(float(weight), dtype=kind, device=start.device)
    else:
        raise TypeError(f"weight is {type(weight).__name__}, expected a number or a float tensor")
    return start.to(kind), end.to(kind), t


def _exact_ends(path: Tensor, a: Tensor, b: Tensor, t: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.where(t == 0, a, torch.where(t == 1, b, path)).to(dtype)


def lerp(
    start: Tensor,              # [B, ...]
    end: Tensor,                # as start
    weight: float | Tensor,     # a number, or a float tensor [] or [B]: 0 is start, 1 is end
) -> Tensor:                    # as start
    """(1 - weight) start + weight end, computed in float32, exactly `start` at 0 and exactly `end` at 1."""
    a, b, t = _operands(start, end, weight)
    return _exact_ends(torch.lerp(a, b, t.expand_as(a)), a, b, t, start.dtype)


def slerp(
    start: Tensor,                          # [B, ...]
    end: Tensor,                            # as start
    weight: float | Tensor,                 # a number, or a float tensor [] or [B]: 0 is start, 1 is end
    dim: int | Sequence[int] | None = None, # the dims of a vector; None is all but the first
) -> Tensor:                                # as start
    """Along the great circle between the directions (Shoemake, "Animating rotation with quaternion curves", 1985):
    (sin((1 - t) w) start + sin(t w) end) / sin w, w the angle between them.

    Each vector has its own angle; lengths pass from one to the other as the formula gives them. Ends are exact. Vectors
    that are parallel or of length 0 are joined by a straight line. Opposite ones have many great circles between them:
    the one through the coordinate axis in which `start` is smallest is taken. Computed in float32; differentiable.
    """
    a, b, t = _operands(start, end, weight)
    if a.dim() == 0:
        raise ValueError("start has no dims, expected vectors")
    dims = list(range(1, a.dim())) if dim is None else [dim] if isinstance(dim, int) else list(dim)
    if dim is None and a.dim() == 1:
        dims = [0]
    if not all(-a.dim() <= d < a.dim() for d in dims):
        raise ValueError(f"dim={dim}: expected dims of start, which has {a.dim()}")
    dims = sorted({d % a.dim() for d in dims})
    if t.dim() and 0 in dims:
        raise ValueError(f"dim={dim} with a weight for each row: expected dims after the first")
    if not a.numel():
        return start.clone()
    return _exact_ends(_great_circle(a, b, t, dims), a, b, t, start.dtype)


def _great_circle(a: Tensor, b: Tensor, t: Tensor, dims: list[int]) -> Tensor:
    length = lambda x: torch.linalg.vector_norm(x, dim=dims, keepdim=True)
    size_a, size_b = length(a), length(b)
    usable = (size_a > 0) & (size_b > 0) & size_a.isfinite() & size_b.isfinite()
    u, v = (x / torch.where(usable, size, 1.0) for x, size in ((a, size_a), (b, size_b)))
    # Twice the angle of half a rhombus: exact for small angles and for those near pi, where acos loses half its digits.
    apart, along = length(u - v), length(u + v)
    angle = 2 * torch.atan2(torch.where(usable, apart, 1.0), torch.where(usable, along, 1.0))
    straight = ~usable | (angle < _PARALLEL)
    opposite = usable & (angle > torch.pi - _PARALLEL)
    w = torch.where(straight | opposite, 1.0, angle)
    circle = (torch.sin((1 - t) * w) * a + torch.sin(t * w) * b) / torch.sin(w)
    path = torch.where(straight, torch.lerp(a, b, t.expand_as(a)), circle)
    if not torch.compiler.is_compiling() and opposite.device.type == "cpu" and not opposite.any():
        return path
    turn = torch.pi * t
    over = torch.cos(turn) * u + torch.sin(turn) * _perpendicular(u, dims)
    return torch.where(opposite, over * torch.lerp(size_a, size_b, t.expand_as(size_a) if t.dim() == 0 else t), path)


def _perpendicular(u: Tensor, dims: list[int]) -> Tensor:
    """A unit vector at right angles to u: the axis in which u is smallest, less its part along u."""
    kept = [d for d in range(u.dim()) if d not in dims]
    moved = u.permute(*kept, *dims)
    flat = moved.reshape(*moved.shape[: len(kept)], -1)
    axis = torch.zeros_like(flat).scatter_(-1, flat.detach().abs().argmin(-1, keepdim=True), 1.0)
    side = axis - (axis * flat).sum(-1, keepdim=True) * flat
    side = side / torch.linalg.vector_norm(side, dim=-1, keepdim=True).clamp_min(1e-12)
    order = [*kept, *dims]
    return side.reshape(moved.shape).permute([order.index(d) for d in range(u.dim())])


__all__ = ["lerp", "slerp"]
