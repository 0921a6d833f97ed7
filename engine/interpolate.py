"""Paths between latents: straight lines and great circles."""
from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, float32, float64

from . import _checks as check
from ._ops import keep, recall, route, signature


def _weight(weight: float | Tensor) -> tuple[float, Tensor | None]:
    """The weight as (number, tensor or None)."""
    if isinstance(weight, Tensor):
        return 0.0, weight
    if isinstance(weight, (int, float)) and not isinstance(weight, bool):
        return float(weight), None
    raise TypeError(f"weight is {type(weight).__name__}, expected a number or a float tensor")


def _check(start: Tensor, end: Tensor, weights: Tensor | None, out: Tensor | None) -> None:
    check.is_float_tensor("start", start)
    check.is_like("end", end, "start", start)
    if weights is not None:
        rows = start.shape[0] if start.dim() else 1
        if not weights.is_floating_point():
            raise TypeError(f"weight has dtype {weights.dtype}, expected a number or a float tensor")
        if weights.device != start.device:
            raise ValueError(f"weight is on {weights.device}, expected the device of start, {start.device}")
        if tuple(weights.shape) not in ((), (rows,)):
            raise ValueError(f"weight has shape {tuple(weights.shape)}, expected () or ({rows},)")
    check.is_out(out, start.shape, start.dtype, start.device)


def _by_row(weights: Tensor | None) -> bool:
    return weights is not None and weights.dim() > 0


def _in_sums(weights: Tensor | None, start: Tensor) -> Tensor | None:
    """The weights in the type of the sums."""
    return None if weights is None else weights.to(float64 if start.dtype == float64 else float32)


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
    number, weights = _weight(weight)
    given = signature("lerp", start, end, weights, out, backend)
    if (known := recall(given)) is None:
        _check(start, end, weights, out)
        whole = not _by_row(weights) and start.is_contiguous() and end.is_contiguous()
        run, rows = None, 1 if whole or not start.dim() else start.shape[0]
    else:
        run, rows = known
    if not start.numel():
        return start.clone() if out is None else out
    args = (start.reshape(rows, 1, -1), end.reshape(rows, 1, -1), number, _in_sums(weights, start), False)
    if run is None:
        run = route("interpolate", args, backend)
        keep(given, (run, rows))
    result = run(*args).reshape(start.shape)
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
    number, weights = _weight(weight)
    if dim is not None and not isinstance(dim, int):
        dim = tuple(dim)
    given = signature("slerp", start, end, weights, dim, out, backend)
    if (known := recall(given)) is None:
        _check(start, end, weights, out)
        run, plan = None, _vectors(start, weights, dim)
    else:
        run, plan = known
    if not start.numel():
        return start.clone() if out is None else out
    sizes, order, back = plan
    a, b = (start, end) if order is None else (start.permute(order), end.permute(order))
    args = (a.reshape(sizes), b.reshape(sizes), number, _in_sums(weights, start), True)
    if run is None:
        run = route("interpolate", args, backend)
        keep(given, (run, plan))
    result = run(*args).reshape(a.shape)
    if back is not None:
        result = result.permute(back)
    return result if out is None else out.copy_(result)


def _vectors(
    start: Tensor, weights: Tensor | None, dim: int | tuple[int, ...] | None
) -> tuple[tuple[int, int, int], list[int] | None, list[int] | None]:
    """The sizes (rows, vectors of a row, length), the order of dims that puts a vector's last, and the way back; None
    where they are."""
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
    kept = [d for d in range(start.dim()) if d not in dims]
    order = [*kept, *dims]
    rows, length = start.shape[0] if 0 in kept else 1, math.prod([start.shape[d] for d in dims])
    sizes = rows, math.prod([start.shape[d] for d in kept]) // max(rows, 1), length
    if order == sorted(order):
        return sizes, None, None
    return sizes, order, [order.index(d) for d in range(start.dim())]


__all__ = ["lerp", "slerp"]
