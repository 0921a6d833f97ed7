"""What the host wrappers share: the device of a launch, keys, rows that a kernel can read in wide loads."""
from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from .._native import by_rows

VECTOR = 16         # bytes of the widest load: rows whose length fills whole ones start on such an address

# No multiply is fused with an add behind the author's back: `tl.fma` stands where one is meant.
OPTIONS: dict[str, Any] = {"enable_fp_fusion": False}


def on(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Launches inside go to the device of x."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return contextlib.nullcontext()


def power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def key_part(value: int, values: Tensor | None) -> tuple[int, Tensor | None, int]:
    """One part of a random key as (number, tensor, step from row to row)."""
    return value, values, values.stride(0) if values is not None and values.dim() else 0


def key_arguments(keys: tuple[Any, ...]) -> tuple[Any, ...]:
    """(seed, seeds, stream, streams, offset, offsets) as the kernels take them."""
    return tuple(part for i in (0, 2, 4) for part in key_part(keys[i], keys[i + 1]))


def keyed_by_row(keys: tuple[Any, ...]) -> bool:
    return any(k is not None and k.dim() for k in keys[1::2])


def aligned(x: Tensor, length: int) -> bool:
    """Whether each row of `length` elements can be read in wide loads, as far as its length says."""
    return length * x.element_size() % VECTOR == 0


def rows_of(x: Tensor, length: int) -> tuple[Tensor, int]:
    """`by_rows`, copied too where a row of a length that fills wide loads does not start on a wide address.

    So the compiled variant is a function of dtype and length alone, and a row's sums have one order.
    """
    x, step = by_rows(x, length)
    if aligned(x, length) and (x.data_ptr() % VECTOR or step * x.element_size() % VECTOR):
        return x.clone(memory_format=torch.contiguous_format), length
    return x, step


def layout_of(x: Tensor) -> tuple[int, int] | None:
    """x [B, ...] as rows of segments: (elements that lie in one piece, from a segment to the next), or None."""
    dims = [(size, step) for size, step in zip(x.shape[1:], x.stride()[1:], strict=True) if size != 1]
    run = 1
    while dims and dims[-1][1] == run:
        run *= dims.pop()[0]
    if not dims:
        return run, run
    segment = dims[-1][1]
    length = 1
    for size, step in reversed(dims):
        if step != segment * length:
            return None
        length *= size
    return run, segment
