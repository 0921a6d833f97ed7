"""Random numbers in Triton: the recipe of engine/reference/rng.py, operation by operation, and the fill.

Launched with enable_fp_fusion=False: each multiply and add rounds on its own. Where the recipe negates, a multiply by
-1 does it: Triton 3.6 computes -x as 0 - x, which loses the sign of zero.
"""
from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.rng import DISTRIBUTIONS
from ._host import OPTIONS, key_arguments, keyed_by_row, on, power_of_two

UNIFORM: tl.constexpr = tl.constexpr(DISTRIBUTIONS.index("uniform"))
NORMAL: tl.constexpr = tl.constexpr(DISTRIBUTIONS.index("normal"))
GUMBEL: tl.constexpr = tl.constexpr(DISTRIBUTIONS.index("gumbel"))
EXPONENTIAL: tl.constexpr = tl.constexpr(DISTRIBUTIONS.index("exponential"))
LAPLACE: tl.constexpr = tl.constexpr(DISTRIBUTIONS.index("laplace"))
BITS: tl.constexpr = tl.constexpr(len(DISTRIBUTIONS))

_CODES = {name: code for code, name in enumerate((*DISTRIBUTIONS, "bits"))}

_KEYS = ("seed", "seeds_step", "stream", "streams_step", "offset", "offsets_step")


@triton.jit
def key_of(row, seed, Seeds, seeds_step, stream, Streams, streams_step, offset, Offsets, offsets_step):
    """(seed, stream, first block) of a row of random numbers: the tensor's where there is one, else the number."""
    s = (row * 0 + seed).to(tl.int64) if Seeds is None else tl.load(Seeds + row * seeds_step)
    t = (row * 0 + stream).to(tl.int64) if Streams is None else tl.load(Streams + row * streams_step)
    o = (row * 0 + offset).to(tl.int64) if Offsets is None else tl.load(Offsets + row * offsets_step)
    return s, t, o


@triton.jit
def philox(seed, stream, block):
    """Four words of Philox4x32-10 for int64 seed, stream and block, which broadcast."""
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    c0, c1 = block.to(tl.uint32), (block >> 32).to(tl.uint32)
    c2, c3 = stream.to(tl.uint32), (stream >> 32).to(tl.uint32)
    c2, c3 = c2 + c0 * 0, c3 + c0 * 0
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(c0, c0 * 0 + 0xD2511F53), tl.mul(c0, 0xD2511F53, sanitize_overflow=False)
        high1, low1 = tl.umulhi(c2, c2 * 0 + 0xCD9E8D57), tl.mul(c2, 0xCD9E8D57, sanitize_overflow=False)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def unit(word):
    return tl.minimum(word.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10, 0.9999999403953552)


@triton.jit
def _ln_reduced(f, k):
    p = f * -0.07636439 + 0.12762217
    p = p * f + -0.1315961
    p = p * f + 0.1420158
    p = p * f + -0.16623409
    p = p * f + 0.20001242
    p = p * f + -0.2500082
    p = p * f + 0.3333333
    square = f * f
    tail = f * square * p + k * -2.1219444e-4
    return (tail - 0.5 * square + f) + k * 0.693359375


@triton.jit
def _split(x):
    bits = x.to(tl.int32, bitcast=True) - 0x3F3504F3
    return ((bits & 0x7FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True), bits >> 23


@triton.jit
def ln(x):
    mantissa, k = _split(x)
    return _ln_reduced(mantissa - 1.0, k.to(tl.float32))


@triton.jit
def log1p_neg(u):
    rest = 1.0 - u
    lost = (1.0 - rest) - u
    mantissa, k = _split(rest)
    scale = ((127 - k) << 23).to(tl.float32, bitcast=True)
    return _ln_reduced((mantissa - 1.0) + lost * scale, k.to(tl.float32))


@triton.jit
def sincos_turn(u):
    quarters = 4.0 * u
    quadrant = (quarters + 0.5).to(tl.int32)
    r = quarters - quadrant.to(tl.float32)
    square = r * r
    s = square * -0.0046037226 + 0.07968108
    s = s * square + -0.6459636
    c = square * 0.0008944864 + -0.020855596
    c = c * square + 0.25366855
    c = c * square + -1.2337005
    sine = r * 1.5707964 + (r * square * s + r * -4.371139e-08)
    cosine = square * c + 1.0
    odd = (quadrant & 1) != 0
    sin, cos = tl.where(odd, cosine, sine), tl.where(odd, sine, cosine)
    sin = tl.where((quadrant & 2) != 0, sin * -1.0, sin)
    cos = tl.where(((quadrant + 1) & 2) != 0, cos * -1.0, cos)
    return sin, cos


@triton.jit
def normal_pair(w0, w1):
    radius = tl.sqrt_rn(ln(unit(w0)) * -2.0)
    sin, cos = sincos_turn(unit(w1))
    return radius * cos, radius * sin


@triton.jit
def _one(word, DISTRIBUTION: tl.constexpr):
    u = unit(word)
    if DISTRIBUTION == BITS:
        return word.to(tl.int32, bitcast=True)
    elif DISTRIBUTION == UNIFORM:
        return u
    elif DISTRIBUTION == EXPONENTIAL:
        return ln(u) * -1.0
    elif DISTRIBUTION == GUMBEL:
        return ln(log1p_neg(u) * -1.0) * -1.0
    elif DISTRIBUTION == LAPLACE:
        low = u < 0.5
        size = ln(2.0 * tl.where(low, u, 1.0 - u))
        return tl.where(low, size, size * -1.0)
    else:
        return ln(u) - log1p_neg(u)


@triton.jit
def draw(seed, stream, block, DISTRIBUTION: tl.constexpr):
    """float32 (BITS: int32) [..., 2, 2] of blocks [...]: element i of a block is at [..., i // 2, i % 2]."""
    w0, w1, w2, w3 = philox(seed, stream, block)
    if DISTRIBUTION == NORMAL:
        z0, z1 = normal_pair(w0, w1)
        z2, z3 = normal_pair(w2, w3)
    else:
        z0, z1 = _one(w0, DISTRIBUTION), _one(w1, DISTRIBUTION)
        z2, z3 = _one(w2, DISTRIBUTION), _one(w3, DISTRIBUTION)
    return tl.join(tl.join(z0, z2), tl.join(z1, z3))


@triton.jit
def draw_at(seed, stream, offset, element, DISTRIBUTION: tl.constexpr):
    """The numbers of elements of a row, one by one: four times the words of `draw`, for rows that cut blocks."""
    w0, w1, w2, w3 = philox(seed, stream, offset + element // 4)
    second, odd = (element & 2) != 0, (element & 1) != 0
    low, high = tl.where(second, w2, w0), tl.where(second, w3, w1)
    if DISTRIBUTION == NORMAL:
        z0, z1 = normal_pair(low, high)
        return tl.where(odd, z1, z0)
    else:
        return _one(tl.where(odd, high, low), DISTRIBUTION)


@triton.jit
def draw_tile(
    seed, stream, offset, start, tile, col, DISTRIBUTION: tl.constexpr, WHOLE: tl.constexpr, R: tl.constexpr,
    C: tl.constexpr,
):
    """float32 [R, 4 C] of the elements start [R, 1] + col [4 C], tile by tile; WHOLE: no row begins inside a block."""
    if WHOLE:
        blocks = (tile * C + tl.arange(0, C))[None, :]
        return draw(seed, stream, offset + (start // 4 + blocks), DISTRIBUTION).reshape(R, 4 * C)
    else:
        return draw_at(seed, stream, offset, start + col[None, :], DISTRIBUTION)


@triton.jit(do_not_specialize=["tiles", *_KEYS])
def fill_rows(
    Out, length, tiles, seed: tl.int64, Seeds, seeds_step, stream: tl.int64, Streams, streams_step, offset: tl.int64,
    Offsets, offsets_step, DISTRIBUTION: tl.constexpr, BLOCKS: tl.constexpr,
):
    row = (tl.program_id(0) // tiles).to(tl.int64)
    first = (tl.program_id(0) % tiles).to(tl.int64) * BLOCKS
    key = key_of(row, seed, Seeds, seeds_step, stream, Streams, streams_step, offset, Offsets, offsets_step)
    x = draw(key[0], key[1], key[2] + first + tl.arange(0, BLOCKS), DISTRIBUTION).reshape(4 * BLOCKS)
    x = x.to(Out.dtype.element_ty)
    at = 4 * first + tl.arange(0, 4 * BLOCKS)
    if 4 * (first + BLOCKS) <= length:          # a whole tile: the stores need no mask and are wide
        tl.store(Out + row * length + at, x)
    else:
        tl.store(Out + row * length + at, x, mask=at < length)


def fill(shape: list[int], distribution: str, *args: Any, out: Tensor | None = None) -> Tensor:
    keys, (dtype, device) = args[:6], args[6:]
    direct = out is not None and out.is_contiguous()
    result = out if direct and out is not None else torch.empty(shape, dtype=dtype, device=device)
    rows = shape[0] if keyed_by_row(keys) else 1
    if result.numel():
        length = math.prod(shape) // rows
        blocks = min(256, max(32, power_of_two(-(-length // 4))))
        tiles = -(-length // (4 * blocks))
        with on(result):
            fill_rows[(rows * tiles,)](
                result, length, tiles, *key_arguments(keys), DISTRIBUTION=_CODES[distribution],
                BLOCKS=blocks, num_warps=4 if blocks >= 128 else 1, **OPTIONS,
            )
    return result if direct or out is None else out.copy_(result)
