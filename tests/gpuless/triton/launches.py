"""The calls whose kernels are compiled for every architecture and kept in the kernel report, one function a stem.

Each makes the host wrappers' real calls on `meta` tensors: a shape for each configuration that a wrapper chooses.
"""
from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

META = torch.device("meta")
KEY = (7, None, 9, None, 0, None)
DTYPES = (torch.float32, torch.bfloat16)


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def seeds(rows: int) -> tuple[object, ...]:
    return 0, empty(rows, dtype=torch.int64), 9, None, 0, None


def rng() -> None:
    from onepass.kernels import rng as kernels
    from onepass.reference.rng import DISTRIBUTIONS

    for name in DISTRIBUTIONS:
        kernels.fill([1 << 20], name, *KEY, torch.float32, META)
    kernels.fill([1 << 20], "bits", *KEY, torch.int32, META)
    kernels.fill([64, 4096], "normal", *seeds(64), torch.bfloat16, META)
    kernels.fill([64, 5], "normal", *seeds(64), torch.float16, META)


def reparam() -> None:
    from onepass.kernels import reparam as kernels

    for dtype in DTYPES:
        x = empty(64, 4096, dtype=dtype)
        kernels.forward(x, x, None, *KEY, False)
        kernels.forward(x, x, None, *seeds(64), True)
        kernels.backward(x, empty(64), x, x, None, *seeds(64), False)
        kernels.backward(x, empty(64), x, x, x, *KEY, True)
    x = empty(64, 16)
    kernels.forward(x, x, None, *KEY, True)
    x = empty(64, 5)
    kernels.forward(x, x, None, *KEY, True)


def latent() -> None:
    from onepass.kernels import latent as kernels

    anything, standard = (-math.inf, math.inf), (None, None)
    for dtype in DTYPES:                                    # halves in dim 1: a row each
        both, half = empty(64, 8, 32, 32, dtype=dtype), empty(64, 4, 32, 32, dtype=dtype)
        call = (both, None, None, *KEY, *standard, 1, -30.0, 20.0, 0, False, "row", 0.5, -math.inf)
        kernels.forward(*call)
        kernels.backward(half, empty(64), None, *call, False, False)
    both, half = empty(64, 32, 64, dtype=dtype), empty(64, 32, 32, dtype=dtype)     # in the last dim: segments
    call = (both, None, None, *seeds(64), half, half, 2, *anything, 8, True, "weights", 1.0, -math.inf)
    kernels.forward(*call)
    kernels.backward(empty(8, *half.shape, dtype=dtype), empty(8, 64), empty(8, 64), *call, False, True)
    x, prior = empty(64, 4096), empty(64, 4096)
    call = (x, x, None, *seeds(64), prior, prior, 0, *anything, 0, False, "element", 1.0, 0.5)
    kernels.forward(*call)
    kernels.backward(x, x, None, *call, False, True)
    x, noise = empty(64, 5), empty(2, 64, 5)
    kernels.forward(x, x, None, *KEY, *standard, 0, -1.0, 1.0, 4, True, "row", 1.0, -math.inf)
    call = (x, x, noise, *KEY, *standard, 0, -1.0, 1.0, 4, True, "row", 1.0, -math.inf)
    kernels.backward(empty(4, 64, 5), empty(64), None, *call, True, False)


def gumbel() -> None:
    from onepass.kernels import gumbel as kernels

    long = 128256                                           # categories of a language model: tiles, in two launches
    x = empty(64, 10)
    kernels.forward(x, *seeds(64), 0.5, True)
    x = empty(64, 1024, dtype=torch.bfloat16)
    kernels.forward(x, *KEY, 0.5, False)
    for n, dtype in ((1024, torch.bfloat16), (8192, torch.float32), (long, torch.bfloat16)):
        x = empty(64, n, dtype=dtype)
        kernels.backward(x, x, *KEY, 0.5)
    kernels.forward(empty(64, long), *seeds(64), 0.5, True)


def interpolate() -> None:
    from onepass.kernels import interpolate as kernels

    # short, and of 1, 8 and 128 tiles
    for shape, dtype in zip(((64, 1, 16), (64, 1, 2048), (64, 1, 16384), (8, 1, 262144)), 2 * DTYPES, strict=True):
        x, weights = empty(*shape, dtype=dtype), empty(shape[0])
        kernels.forward(x, x, 0.0, weights, True)
        kernels.backward(x, x, x, 0.0, weights, True, True)
    x = empty(1, 1, 1 << 20)
    kernels.forward(x, x, 0.5, None, False)
    kernels.backward(x, x, x, 0.5, None, False, False)
    x = empty(64, 8, 5)
    kernels.forward(x, x, 0.0, empty(64), True)
    kernels.backward(x, x, x, 0.0, empty(64), True, True)


def denoise() -> None:
    from onepass.kernels import denoise as kernels

    steps, guidances = empty(8, dtype=torch.int64), empty(8)
    for dtype in DTYPES:
        x = empty(8, 4, 64, 64, dtype=dtype)
        state = empty(8, 2, 4, 64, 64, dtype=dtype)
        step = lambda cond, table, state, noise, stochastic, mask, x=x: kernels.denoise_step(
            x, x, cond, table, 0, steps, state, 1.0, guidances, 0, steps, noise, stochastic, mask,
            None if mask is None else x,
        )
        step(None, empty(50, 9, dtype=torch.float64), None, None, False, None)
        step(x, empty(50, 11, dtype=torch.float64), state, None, True, empty(64, 64, dtype=torch.bool))
    half = x
    x = x.float()
    kernels.denoise_step(x, half, half, empty(50, 9, dtype=torch.float64), 3, None, None, 7.5, None, 0, None, x, True,
                         None, None)


def volrend() -> None:
    from onepass.kernels import volrend as kernels

    def both(features: Tensor, edges: Tensor, offsets: Tensor | None, depth: str, extras: bool) -> None:
        starts, ends = (edges, edges) if offsets is not None else (edges[:, :-1], edges[:, 1:])
        sigmas = starts.new_empty(starts.shape)
        rays = sigmas.shape[0] if offsets is None else offsets.shape[0] - 1
        background = empty(features.shape[-1]) if extras else None
        call = (sigmas, features, starts, ends, None, offsets, background, None, 1e-4, depth)
        kernels.forward(*call, extras, extras)
        per_ray = empty(rays)
        grads = (empty(rays, features.shape[-1]), per_ray, per_ray, sigmas if extras else None,
                 per_ray if extras else None)
        kernels.backward(*grads, *call, [True, True, extras, extras, False, extras, False])

    offsets = empty(4097, dtype=torch.int64)
    both(empty(4096, 128, 3), empty(4096, 129), None, "expected", False)
    both(empty(1 << 18, 3, dtype=torch.bfloat16), empty(1 << 18), offsets, "normalized", True)
    both(empty(1 << 18, 32, dtype=torch.float16), empty(1 << 18), offsets, "median", True)


def attention() -> None:
    from onepass.kernels import attention as kernels
    from onepass.kernels import kvcache

    i32 = lambda *shape: empty(*shape, dtype=torch.int32)
    half = lambda *shape, dtype=torch.bfloat16: empty(*shape, dtype=dtype)

    def decode(q: Tensor, cache: Tensor, table: Tensor | None, rotary: Tensor | None, **options: object) -> None:
        new = cache.new_empty(q.shape[0], q.shape[1], *cache.shape[2:])
        place = (table, None, None, None, q.shape[1], rotary, rotary, False)
        kvcache.kvcache_append(cache, cache, new, new, i32(q.shape[0]), *place)
        scores = {"causal": True, "window_left": -1, "window_right": -1, "softcap": 0.0, "scale": 0.1, **options}
        kernels.kvcache_attention(q, cache, cache, i32(q.shape[0]), q.shape[1], *place, **scores)

    decode(half(8, 1, 32, 128), half(2048, 16, 8, 128), i32(8, 256), empty(4096, 64))
    decode(half(8, 1, 16, 64, dtype=torch.float16), half(8, 4096, 16, 64, dtype=torch.float16), None, None,
           window_left=1023, softcap=30.0, alibi_slopes=empty(16), sinks=empty(16))
    decode(half(8, 8, 32, 128), half(8, 8192, 8, 128), None, None, causal=False,
           tree_mask=torch.empty(8, 8, 8, dtype=torch.bool, device=META))
    for table, x in ((None, half(4096, 8, 128)), (i32(8, 64), empty(512, 16, 8, 128))):
        q = x.new_empty(4096, 32, 128)
        kernels.varlen_forward(q, x, x, i32(9), i32(9), 512, 1024, table, True, -1, -1, 0.0, 0.1)
    scores = (-1, -1, 0.0, 0.1, None, None, None)
    x = half(2, 1024, 16, 128)
    kernels.forward(x, x[:, :, :4], x[:, :, :4], True, *scores)
    x = empty(2, 1024, 8, 64)
    kernels.forward(x, x, x, True, *scores)
    x = empty(2, 1024, 8, 256)
    kernels.forward(x, x, x, True, *scores)
    x = half(2, 1024, 8, 256)
    kernels.forward(x, x, x, False, *scores)
    kernels.forward(x, x, x, False, -1, -1, 0.0, 0.1, None, None, empty(1024, 1024))


def attention_backward() -> None:
    from onepass.kernels import attention_backward as kernels

    def dense(q: Tensor, k: Tensor, causal: bool, *scores: object) -> None:
        lse = empty(q.shape[0], q.shape[2], q.shape[1])
        kernels.backward(q, None, q, k, k, q, lse, causal, *scores)

    plain = (-1, -1, 0.0, 0.1, None, None, None)
    for dtype, dim in ((torch.bfloat16, 256), (torch.float32, 128)):
        q = empty(2, 1024, 16, dim, dtype=dtype)
        dense(q, q[:, :, :4], True, *plain)
    q = empty(2, 1024, 16, 128, dtype=torch.float16)
    dense(q, q, False, 1023, 0, 30.0, 0.1, empty(16), empty(16), empty(1024, 1024, dtype=torch.bool))
    q, k = (empty(4096, heads, 64, dtype=torch.bfloat16) for heads in (32, 8))
    i32 = lambda n: empty(n, dtype=torch.int32)
    kernels.varlen_backward(q, None, q, k, k, q, empty(32, 4096), i32(9), i32(9), 512, 1024, True, -1, -1, 0.0, 0.1)


def attention_merge() -> None:
    from onepass.kernels import attention_merge as kernels

    def both(parts: int, dim: int, dtype: torch.dtype, sinks: Tensor | None, grad_lse: bool) -> None:
        outs, lses = empty(parts, 32, 4, 16, dim, dtype=dtype), empty(parts, 32, 16, 4)
        kernels.forward(outs, lses, sinks)
        kernels.backward(outs[0], lses[0] if grad_lse else None, outs, lses, outs[0], lses[0], sinks)

    for dtype in DTYPES:
        both(8, 128, dtype, None, False)
    both(2, 64, torch.float16, empty(16), True)             # a prefix and a suffix
    both(300, 128, torch.bfloat16, None, True)              # more than are held
    both(33, 40, torch.float32, empty(16), False)


STEMS: dict[str, Callable[[], None]] = {
    "rng": rng, "reparam": reparam, "latent": latent, "gumbel": gumbel, "interpolate": interpolate,
    "denoise": denoise, "volrend": volrend, "attention": attention, "attention_backward": attention_backward,
    "attention_merge": attention_merge,
}
