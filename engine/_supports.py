"""What each implementation takes: None, or the reason why it cannot take a call. Arguments are the core op's."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _native

# What an argument of a core op is where it is no tensor: told apart by type, which is quicker than isinstance.
SCALARS = frozenset((int, float, bool, type(None), str, list, torch.dtype, torch.device))
_CUDA_HEAD_DIM = 256         # MOST_CHANNELS in csrc/cuda/attention.cuh
_CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def native_cpu(*args: Any) -> str | None:
    """The part that every CPU kernel asks: the extension is there and each tensor is in host memory."""
    if _native.error is not None:
        return _native.error
    for x in args:
        if type(x) not in SCALARS and isinstance(x, Tensor) and not x.is_cpu:
            return f"a tensor is on {x.device}, the kernel reads host memory"
    return None


def native_cuda(*args: Any) -> str | None:
    """The part that every CUDA kernel asks: each tensor is in device memory and the extension has its CUDA part."""
    for x in args:
        if type(x) not in SCALARS and isinstance(x, Tensor) and not _native.on_device(x):
            return f"a tensor is on {x.device}, the kernel reads device memory"
    return _native.cuda_error


def cpu_dtype(dtype: torch.dtype) -> str | None:
    return None if dtype in _CPU_DTYPES else f"dtype is {dtype}, the kernel takes float32, bfloat16 and float16"


def floats_cpu(x: Tensor, *args: Any) -> str | None:
    """Host tensors, the first of a dtype that the kernels know."""
    return native_cpu(x, *args) or cpu_dtype(x.dtype)


def floats_cuda(x: Tensor, *args: Any) -> str | None:
    return native_cuda(x, *args) or cpu_dtype(x.dtype)


def merge_cpu(outs: Tensor, lses: Tensor, *args: Any) -> str | None:
    return floats_cpu(outs, lses, *args) or cpu_dtype(lses.dtype)


def merge_backward_cpu(
    grad_out: Tensor, grad_lse: Tensor | None, outs: Tensor, lses: Tensor, *args: Any
) -> str | None:
    return native_cpu(grad_out, grad_lse) or merge_cpu(outs, lses, *args)


def merge_cuda(outs: Tensor, lses: Tensor, *args: Any) -> str | None:
    return floats_cuda(outs, lses, *args) or cpu_dtype(lses.dtype)


def merge_backward_cuda(
    grad_out: Tensor, grad_lse: Tensor | None, outs: Tensor, lses: Tensor, *args: Any
) -> str | None:
    return native_cuda(grad_out, grad_lse) or merge_cuda(outs, lses, *args)


def rng_cpu(shape: Any, distribution: str, seed: int, seeds: Tensor | None, stream: int, streams: Tensor | None,
            offset: int, offsets: Tensor | None, dtype: torch.dtype, device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"device is {device}, the kernel writes host memory"
    return native_cpu(seeds, streams, offsets) or (None if distribution == "bits" else cpu_dtype(dtype))


def reparam_backward_cpu(grad_z: Tensor | None, grad_kl: Tensor | None, mean: Tensor, *args: Any) -> str | None:
    return floats_cpu(mean, *args) or native_cpu(grad_z, grad_kl)


def latent_backward_cpu(
    grad_z: Tensor | None, grad_first: Tensor | None, grad_second: Tensor | None, mean: Tensor, *args: Any
) -> str | None:
    return floats_cpu(mean, *args) or native_cpu(grad_z, grad_first, grad_second)


def rng_cuda(shape: Any, distribution: str, seed: int, seeds: Tensor | None, stream: int, streams: Tensor | None,
             offset: int, offsets: Tensor | None, dtype: torch.dtype, device: torch.device) -> str | None:
    if device.type != ("cpu" if _native.emulated else "cuda"):
        return f"device is {device}, the kernel writes device memory"
    return native_cuda(seeds, streams, offsets) or (None if distribution == "bits" else cpu_dtype(dtype))


def reparam_backward_cuda(grad_z: Tensor | None, grad_kl: Tensor | None, mean: Tensor, *args: Any) -> str | None:
    return floats_cuda(mean, *args) or native_cuda(grad_z, grad_kl)


def latent_backward_cuda(
    grad_z: Tensor | None, grad_first: Tensor | None, grad_second: Tensor | None, mean: Tensor, *args: Any
) -> str | None:
    return floats_cuda(mean, *args) or native_cuda(grad_z, grad_first, grad_second)


def denoise_cpu(sample: Tensor, model_output: Tensor, *args: Any) -> str | None:
    return denoise(native_cpu, sample, model_output, *args)


def denoise_cuda(sample: Tensor, model_output: Tensor, *args: Any) -> str | None:
    return denoise(native_cuda, sample, model_output, *args)


def denoise(native: Callable[..., str | None], sample: Tensor, model_output: Tensor, *args: Any) -> str | None:
    """Of the kernel whose tensors `native` asks for: no gradient, and dtypes that go together."""
    tensors = [x for x in (sample, model_output, *args) if isinstance(x, Tensor)]
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return "a gradient is needed, and only the reference has one"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a torch.func transform is active, and only the reference can be transformed"
    if why := native(*tensors) or cpu_dtype(sample.dtype) or cpu_dtype(model_output.dtype):
        return why
    if sample.dtype not in (torch.float32, model_output.dtype):
        return f"model_output is {model_output.dtype} with a {sample.dtype} sample"
    return None


def composite_cpu(*args: Any) -> str | None:
    return _composite(native_cpu, *args)


def composite_cuda(*args: Any) -> str | None:
    return _composite(native_cuda, *args)


def _composite(native: Callable[..., str | None], *args: Any) -> str | None:
    """Each tensor of a dtype that the kernels know: they may differ, times are often float32."""
    if why := native(*args):
        return why
    floats = (x.dtype for x in args if isinstance(x, Tensor) and x.dtype != torch.int64)
    return next((why for dtype in floats if (why := cpu_dtype(dtype))), None)


def append_cpu(k_cache: Tensor, v_cache: Tensor, k: Tensor, *args: Any) -> str | None:
    return cache_strides(k_cache, v_cache) or floats_cpu(k, k_cache, v_cache, *args)


def kvcache_cpu(q: Tensor, k_cache: Tensor, v_cache: Tensor, *args: Any) -> str | None:
    return cache_strides(k_cache, v_cache) or floats_cpu(q, k_cache, v_cache, *args)


def cache_strides(k_cache: Tensor, v_cache: Tensor) -> str | None:
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.numel() and cache.stride(-1) != 1 and cache.shape[-1] != 1:
            return f"{name} has stride {cache.stride(-1)} in the head dim, the kernel takes 1"
    return None


def no_codes(k_cache: Tensor) -> str | None:
    """Why a kernel that takes no quantized cache refuses this one."""
    return None if k_cache.is_floating_point() and k_cache.itemsize > 1 else f"it takes no cache of {k_cache.dtype} yet"


def attention_cuda(*args: Any) -> str | None:
    return _head_dims(*args[:3]) or floats_cuda(*args)


def append_cuda(k_cache: Tensor, v_cache: Tensor, *args: Any) -> str | None:
    return kvcache_cuda(k_cache, k_cache, v_cache, *args)


def kvcache_cuda(q: Tensor, k_cache: Tensor, v_cache: Tensor, *args: Any) -> str | None:
    refused = no_codes(k_cache) or cache_strides(k_cache, v_cache) or _head_dims(q, v_cache)
    return refused or floats_cuda(q, k_cache, v_cache, *args)


def varlen_cuda(*args: Any) -> str | None:
    return no_gradient(*args) or page_strides(*args[1:3]) or _head_dims(*args[:3]) or floats_cuda(*args)


def no_gradient(*args: Any) -> str | None:
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args):
        return "a gradient is needed, and this backend has none yet"
    return None


def _head_dims(*tensors: Tensor) -> str | None:
    widest = max(x.shape[-1] for x in tensors)
    return f"a head dim is {widest}, the kernel takes up to {_CUDA_HEAD_DIM}" if widest > _CUDA_HEAD_DIM else None


def varlen_cpu(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> str | None:
    """As floats_cpu; pages are read where they are, so their head dim has unit stride."""
    return page_strides(k, v) or floats_cpu(q, k, v, *args)


def page_strides(k: Tensor, v: Tensor) -> str | None:
    for name, pages in (("k", k), ("v", v)):
        if pages.dim() == 4 and pages.numel() and pages.stride(-1) != 1 and pages.shape[-1] != 1:
            return f"{name} has stride {pages.stride(-1)} in the head dim, the kernel takes pages with 1"
    return None
