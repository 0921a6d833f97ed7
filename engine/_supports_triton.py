"""What the Triton kernels take: None, or the reason why they cannot take a call. Arguments are the core op's."""
from __future__ import annotations

import functools
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from . import _supports
from ._supports import SCALARS, cpu_dtype


@functools.cache
def missing() -> str | None:
    """Why no Triton kernel can run here, or None. Triton is looked for and not imported."""
    spec = importlib.util.find_spec("triton")
    return None if spec is not None and spec.origin else "triton is not installed"


@functools.cache
def interpreted() -> bool:
    """Triton's interpreter runs kernels on host memory; it is asked for before the first of them is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def on_gpu(*args: Any) -> str | None:
    """The part that every Triton kernel asks: Triton is there and each tensor is on a GPU."""
    if why := missing():
        return why
    for x in args:
        if type(x) not in SCALARS and isinstance(x, Tensor) and not (x.is_cuda or (x.is_cpu and interpreted())):
            return f"a tensor is on {x.device}, the kernel runs on a GPU"
    return None


@functools.cache
def random(device: torch.device) -> str | None:
    """Why Triton's random numbers would not have the recipe's bits on this GPU, or None.

    The ptxas 12.9 of Triton before 3.7 makes one fused operation of a packed product and sum on Blackwell, though told
    not to.
    """
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device) < (10, 0):
        return None
    import triton

    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7):
        return f"the assembler of Triton {triton.__version__} fuses multiplies and adds on this GPU, 3.7 does not"
    return None


def floats(x: Tensor, *args: Any) -> str | None:
    """Tensors on a GPU, the first of a dtype that the kernels know."""
    return on_gpu(x, *args) or cpu_dtype(x.dtype)


def rng(shape: Any, distribution: str, seed: int, seeds: Tensor | None, stream: int, streams: Tensor | None,
        offset: int, offsets: Tensor | None, dtype: torch.dtype, device: torch.device) -> str | None:
    if device.type != "cuda" and not (device.type == "cpu" and interpreted()):
        return missing() or f"device is {device}, the kernel runs on a GPU"
    if distribution == "bits":                  # whole numbers: nothing to fuse
        return on_gpu(seeds, streams, offsets)
    return on_gpu(seeds, streams, offsets) or cpu_dtype(dtype) or random(device)


def reparam(mean: Tensor, logvar: Tensor | None, noise: Tensor | None, *args: Any) -> str | None:
    return floats(mean, logvar, noise, *args) or (random(mean.device) if noise is None else None)


def reparam_backward(grad_z: Tensor | None, grad_kl: Tensor | None, *args: Any) -> str | None:
    return on_gpu(grad_z, grad_kl) or reparam(*args)


def latent_backward(
    grad_z: Tensor | None, grad_first: Tensor | None, grad_second: Tensor | None, *args: Any
) -> str | None:
    return on_gpu(grad_z, grad_first, grad_second) or reparam(*args)


def gumbel(logits: Tensor, *args: Any) -> str | None:
    return floats(logits, *args) or random(logits.device)


def denoise(*args: Any) -> str | None:
    sample, noise, stochastic = args[0], args[11], args[12]
    return _supports.denoise(on_gpu, *args) or (random(sample.device) if stochastic and noise is None else None)


def composite(*args: Any) -> str | None:
    """Tensors on a GPU, each of a dtype that the kernels know: they may differ, times are often float32."""
    if why := on_gpu(*args):
        return why
    floats = (x.dtype for x in args if isinstance(x, Tensor) and x.dtype != torch.int64)
    return next((why for dtype in floats if (why := cpu_dtype(dtype))), None)


def append(k_cache: Tensor, v_cache: Tensor, *args: Any) -> str | None:
    return kvcache(k_cache, k_cache, v_cache, *args)


def kvcache(q: Tensor, k_cache: Tensor, v_cache: Tensor, *args: Any) -> str | None:
    refused = _supports.no_codes(k_cache) or _supports.cache_strides(k_cache, v_cache)
    return refused or floats(q, k_cache, v_cache, *args)


def varlen(*args: Any) -> str | None:
    """Ragged rows: what the CPU asks of pages."""
    return _supports.page_strides(*args[1:3]) or floats(*args)


def merge(outs: Tensor, lses: Tensor, *args: Any) -> str | None:
    return floats(outs, lses, *args) or cpu_dtype(lses.dtype)


def merge_backward(grad_out: Tensor, grad_lse: Tensor | None, *args: Any) -> str | None:
    return on_gpu(grad_out, grad_lse) or merge(*args)
