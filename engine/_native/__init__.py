"""From tensors to what onepass._C takes. Arguments arrive checked; nothing is read but metadata."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

try:
    from .. import _C
except ImportError as failure:
    error: str | None = f"the native extension onepass._C is not usable ({failure})"
else:
    error = None

if error is None and not _C.has_cuda:
    cuda_error: str | None = "this build has no CUDA part (nvcc was not found, or ONEPASS_CUDA=0)"
else:
    cuda_error = error
emulated = False        # the block emulator stands in for a device: the CUDA kernels are its own and take host tensors

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
CODES = {torch.int8: 1, torch.float8_e4m3fn: 2}         # of quantized caches


def pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def row_length(x: Tensor) -> tuple[int, int]:
    """The rows of dim 0, and the elements of each; a scalar is one row."""
    rows = x.shape[0] if x.dim() else 1
    return rows, x.numel() // rows if rows else 0


def by_rows(x: Tensor, length: int) -> tuple[Tensor, int]:
    """x, or a copy, with unit stride inside a row of dim 0; and the elements from one row to the next.

    The caller keeps the tensor until the kernel has run. A chunk of a larger tensor needs no copy.
    """
    if x.is_contiguous():
        return x, length
    if x.shape[0] and x[0].is_contiguous():
        return x, x.stride(0)
    return x.contiguous(), length


def is_writable(x: Tensor) -> bool:
    """Whether a kernel can write x where it lies: rows of dim 0 in one piece that do not overlap."""
    if x.is_contiguous():
        return True
    row = x[0]
    return row.is_contiguous() and (len(x) < 2 or x.stride(0) >= row.numel())


def run(kernel: Callable[..., int], *arguments: Any) -> None:
    """Calls a kernel that says which of its arguments (a bit each) lie otherwise than it reads: again with copies."""
    while odd := kernel(*arguments):
        arguments = tuple(x.contiguous() if odd >> i & 1 else x for i, x in enumerate(arguments))


def mask_rows(mask: Tensor, sample: Tensor) -> tuple[Tensor, int, int]:
    """A mask that broadcasts to `sample`, as bools or floats [B or 1, period], the elements from row to row (0 where
    rows share one), and the period in which it repeats along a row; a leading broadcast costs no copy."""
    full = mask.reshape((1,) * (sample.dim() - mask.dim()) + tuple(mask.shape))
    if full.dtype != torch.bool:
        full = full.float()
    inner = next((d for d in range(1, full.dim()) if full.shape[d] != 1), full.dim())       # leading ones repeat
    full = full.expand(full.shape[0], *full.shape[1:inner], *sample.shape[inner:]).contiguous()
    period = full.numel() // full.shape[0] if full.shape[0] else 0
    return full, period if full.shape[0] > 1 else 0, max(period, 1)


def cache_fits(
    cache: Tensor, cache_seqlens: Tensor, appended: int, block_table: Tensor | None, cache_batch_idx: Tensor | None,
    cache_leftpad: Tensor | None, cu_seqlens_q: Tensor | None, max_seqlen_q: int, tokens: int, positions: int | None,
) -> bool:
    """Whether each value points inside the cache, as _attention_checks.cache_values asks; False too where the host
    cannot tell quickly, so that it has to look."""
    return _C.cache_fits(
        cache, cache_seqlens, appended, block_table, cache_batch_idx, cache_leftpad, cu_seqlens_q, max_seqlen_q, tokens,
        -1 if positions is None else positions,
    )


def on_device(x: Tensor) -> bool:
    """Whether x is where the CUDA kernels read."""
    return x.is_cpu if emulated else x.is_cuda


def kernels(x: Tensor) -> tuple[Any, Any]:
    """The kernels for x's device, and what they run on: a number of threads, or (device, current stream)."""
    if not on_device(x):
        return _C, torch.get_num_threads()
    device = x.get_device()
    return _C.cuda, (0, 0) if emulated else (device, torch._C._cuda_getCurrentRawStream(device))


def empty_like(x: Tensor) -> Tensor:
    """A contiguous tensor with the shape and dtype of x."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


__all__ = [
    "CODES",
    "DTYPES",
    "_C",
    "by_rows",
    "cache_fits",
    "cuda_error",
    "empty_like",
    "emulated",
    "error",
    "is_writable",
    "kernels",
    "mask_rows",
    "on_device",
    "pointer",
    "row_length",
    "run",
]
