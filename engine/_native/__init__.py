"""From tensors to the pointers that onepass._C takes. Arguments arrive checked; nothing is read but metadata."""
from __future__ import annotations

import torch
from torch import Tensor

try:
    from .. import _C
except ImportError as failure:
    error: str | None = f"the native extension onepass._C is not usable ({failure})"
else:
    error = None

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def key_part(value: int, values: Tensor | None) -> tuple[int, int, int]:
    """One part of a random key as (number, pointer, step from row to row)."""
    if values is None:
        return value, 0, 0
    return 0, values.data_ptr(), values.stride(0) if values.dim() else 0


def by_rows(x: Tensor) -> tuple[Tensor, int]:
    """x, or a copy, with unit stride inside a row of dim 0; and the elements from one row to the next.

    The caller keeps the tensor until the kernel has run. A chunk of a larger tensor needs no copy.
    """
    if x.dim() == 0:
        return x, 0
    if x.is_contiguous() or (x.shape[0] and x[0].is_contiguous()):
        return x, x.stride(0)
    x = x.contiguous()
    return x, x.stride(0)


__all__ = ["DTYPES", "_C", "by_rows", "error", "key_part", "pointer"]
