"""Paths between latents: straight lines and great circles."""
from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, float32, float64

from . import _checks as check
from ._ops import call


def _weight(start: Tensor, end: Tensor, weight: float | Tensor) -> tuple[float, Tensor | None]:
    """The weight as (number, tensor or None), the tensor in the type of the sums; checks all three."""
    check.is_float_tensor("start", start)
    check.is_like("end", end, "start", start)
    if isinstance(weight, Tensor):
        rows = start.shape[0] if start.dim() else 1
        if not weight.is_floating_point():
            raise TypeError(f"weight has dtype {weight.dtype}, expected a number or a float tensor")
        if weight.device != start.device:
            raise ValueError(f"weight is on {weight.device}, expected the device of start, {start.device}")
        if tuple(weight.shape) not in ((), (rows,)):
            raise ValueError(f"weight has shape {tuple(weight.shape)}, expected () or ({rows},)")
        return 0.0, weight.to(float64 if start.dtype == float64 else float32)
    if isinstance(weight, (int, float)) and not isinstance(weight, bool):
        return float(weight), None
    raise TypeError(f"weight is {type(weight).__name__}, expected a number or a float tensor")


def _by_row(weights: Tensor | None) -> bool:
    return weights is not None and weights.dim() > 0


def lerp(
    start: Tensor,              # [B, ...] float32, bfloat16, float16 (float64: reference)
    end: Tensor,                # as start
    weight: float | Tensor,     # a number, or a float tensor [] or [B]: 0 is start, 1 is end
    *,
    out: Tensor | None = None,  # as start; not together with a gradient
    backend: str | None = None,
) -> Tensor:                    # as start
    """(1 - weight) start + weight end, computed in float32, exactly `start` at 0 and exactly `end` at 1.

    Differentiable in all three; at an exact end the result is that operand, and the weight's gradient is 0 there. What
    does not lie in rows of dim 0 is copied first. Raises ValueError or TypeError that names the argument.
    """
    number, weights = _weight(start, end, weight)
    check.is_out(out, start.shape, start.dtype, start.device)
    if not start.numel():
        return start.clone() if out is None else out
    whole = not _by_row(weights) and start.is_contiguous() and end.is_contiguous()
    rows = 1 if whole or not start.dim() else start.shape[0]
    a, b = start.reshape(rows, 1, -1), end.reshape(rows, 1, -1)
    result = call("interpolate", a, b, number, weights, False, backend=backend).reshape(start.shape)
    return result if out is None else out.copy_(result)


def slerp(
    start: Tensor,                          # [B, ...] float32, bfloat16, float16 (float64: reference)
    end: Tensor,                            # as start
    weight: float | Tensor,                 # a number, or a float tensor [] or [B]: 0 is start, 1 is end
    dim: int | Sequence[int] | None = None, # the dims of a vector; None is all but the first
    *,
    out: Tensor | None = None,              # as start; not together with a gradient
    backend: str | None = None,
) -> Tensor:                                # as start
    """Along the great circle between the directions (Shoemake, "Animating rotation with quaternion curves", 1985):
    (sin((1 - t) w) start + sin(t w) end) / sin w, w the angle between them.

    Each vector has its own angle; lengths pass from one to the other as the formula gives them. Ends are exact. Vectors
    that are parallel, of length 0 or not finite are joined by a straight line. Opposite ones have many great circles
    between them: the one through the coordinate axis in which `start` is smallest is taken. Angles and sums are
    float64, elements float32. Differentiable in start, end and weight, as `lerp` at the ends; forward keeps nothing but
    its inputs. A `dim` that is not last, and what does not lie in rows of dim 0, is copied first. Raises ValueError or
    TypeError that names the argument.
    """
    number, weights = _weight(start, end, weight)
    if start.dim() == 0:
        raise ValueError("start has no dims, expected vectors")
    dims = list(range(1, start.dim())) if dim is None else [dim] if isinstance(dim, int) else list(dim)
    if dim is None and start.dim() == 1:
        dims = [0]
    if not all(-start.dim() <= d < start.dim() for d in dims):
        raise ValueError(f"dim={dim}: expected dims of start, which has {start.dim()}")
    dims = sorted({d % start.dim() for d in dims})
    if _by_row(weights) and 0 in dims:
        raise ValueError(f"dim={dim} with a weight for each row: expected dims after the first")
    check.is_out(out, start.shape, start.dtype, start.device)
    if not start.numel():
        return start.clone() if out is None else out
    kept = [d for d in range(start.dim()) if d not in dims]
    order = [*kept, *dims]
    a, b = start.permute(order), end.permute(order)
    moved, n = a.shape, a.shape[len(kept):].numel()
    rows = start.shape[0] if 0 in kept else 1
    result = call("interpolate", a.reshape(rows, -1, n), b.reshape(rows, -1, n), number, weights, True, backend=backend)
    result = result.reshape(moved).permute([order.index(d) for d in range(start.dim())])
    return result if out is None else out.copy_(result)


__all__ = ["lerp", "slerp"]
