"""Random numbers: the frozen recipe. Every backend gives these float32 bits.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) keyed by the seed; counter
(block low, block high, stream low, stream high). Element i of a row is word i % 4 of block offset + i // 4.

No multiply is fused with an add: each operation below is rounded to float32 on its own, in the order written.
ln is f - f^2/2 + f^3 P(f) on [sqrt(1/2), sqrt(2)); sin and cos reduce exactly in quarter turns. The coefficients are
minimax fits made for this recipe; tests/rng_error.py measures them over every u there is.
"""
import math

import torch
from torch import Tensor

DISTRIBUTIONS = ("uniform", "normal", "gumbel", "exponential", "laplace", "logistic")

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_SQRT_HALF_BITS = 0x3F3504F3
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.1219444e-4      # high has 10 bits: k * high is exact
_LN = (-0.07636439, 0.12762217, -0.1315961, 0.1420158, -0.16623409, 0.20001242, -0.2500082, 0.3333333)
_HALF_PI_HIGH, _HALF_PI_LOW = 1.5707964, -4.371139e-08
_SIN = (-0.0046037226, 0.07968108, -0.6459636)
_COS = (0.0008944864, -0.020855596, 0.25366855, -1.2337005)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Ten rounds of Philox4x32 on int64 tensors that hold 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        low0, low1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]     # wraps at 2^64; the bits are right
        c0, c1, c2, c3 = (
            ((low1 >> 32) & _MASK) ^ c1 ^ k0, low1 & _MASK,
            ((low0 >> 32) & _MASK) ^ c3 ^ k1, low0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def words(
    rows: int,
    length: int,
    seed: Tensor,       # int64 [] or [rows]
    stream: Tensor,     # int64 [] or [rows]
    offset: Tensor,     # int64 [] or [rows], in blocks of four
) -> Tensor:            # int64 [rows, 4 * ceil(length / 4)], each a 32-bit word
    blocks = -(-length // 4)
    seed, stream, offset = (x.reshape(-1, 1).expand(rows, blocks) for x in (seed, stream, offset))
    block = offset + torch.arange(blocks, device=seed.device)
    halves = lambda x: (x & _MASK, (x >> 32) & _MASK)
    drawn = philox((*halves(block), *halves(stream)), halves(seed))
    return torch.stack(drawn, dim=-1).reshape(rows, 4 * blocks)


def unit(word: Tensor) -> Tensor:
    """A word as float32 in (0, 1): the middle of its interval, below 1 by at least one ulp."""
    return torch.clamp_max(word.to(torch.float32) * 2.0**-32 + 2.0**-33, 1 - 2.0**-24)


def _horner(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    total = torch.full_like(x, coefficients[0])
    for c in coefficients[1:]:
        total = total * x + c
    return total


def _ln_reduced(f: Tensor, k: Tensor) -> Tensor:
    """ln((1 + f) 2^k) with f in [sqrt(1/2) - 1, sqrt(2) - 1]."""
    square = f * f
    tail = f * square * _horner(f, _LN) + k * _LN2_LOW
    return (tail - 0.5 * square + f) + k * _LN2_HIGH


def _split(x: Tensor) -> tuple[Tensor, Tensor]:
    """x > 0 as mantissa m in [sqrt(1/2), sqrt(2)) and power k, x = m 2^k, both float32."""
    bits = x.view(torch.int32) - _SQRT_HALF_BITS
    mantissa = ((bits & 0x7FFFFF) + _SQRT_HALF_BITS).view(torch.float32)
    return mantissa, (bits >> 23).to(torch.float32)


def ln(x: Tensor) -> Tensor:
    """Natural logarithm of float32 x > 0, normal."""
    mantissa, k = _split(x)
    return _ln_reduced(mantissa - 1.0, k)


def log1p_neg(u: Tensor) -> Tensor:
    """ln(1 - u) for float32 u in (0, 1): the rounding error of 1 - u is carried along."""
    rest = 1.0 - u
    lost = (1.0 - rest) - u
    mantissa, k = _split(rest)
    scale = ((127 - k.to(torch.int32)) << 23).view(torch.float32)      # 2^-k
    return _ln_reduced((mantissa - 1.0) + lost * scale, k)


def sincos_turn(u: Tensor) -> tuple[Tensor, Tensor]:
    """sin and cos of 2 pi u for float32 u in [0, 1)."""
    quarters = 4.0 * u
    quadrant = (quarters + 0.5).to(torch.int32)
    r = quarters - quadrant.to(torch.float32)                          # exact, |r| <= 1/2
    square = r * r
    sine = r * _HALF_PI_HIGH + (r * square * _horner(square, _SIN) + r * _HALF_PI_LOW)
    cosine = square * _horner(square, _COS) + 1.0
    odd = (quadrant & 1).bool()
    sin, cos = torch.where(odd, cosine, sine), torch.where(odd, sine, cosine)
    return torch.where((quadrant & 2) != 0, -sin, sin), torch.where(((quadrant + 1) & 2) != 0, -cos, cos)


def _sqrt(x: Tensor) -> Tensor:
    return x.double().sqrt().float()        # correctly rounded everywhere; a device's float32 sqrt need not be


def draw(word: Tensor, distribution: str) -> Tensor:
    """float32 draws [rows, n] from words [rows, n], n a multiple of 4 (normals come in pairs)."""
    u = unit(word)
    if distribution == "uniform":
        return u
    if distribution == "normal":
        pair = u.reshape(*u.shape[:-1], u.shape[-1] // 2, 2)
        radius = _sqrt(-2.0 * ln(pair[..., 0]))
        sin, cos = sincos_turn(pair[..., 1])
        return torch.stack((radius * cos, radius * sin), dim=-1).reshape(u.shape)
    if distribution == "exponential":
        return -ln(u)
    if distribution == "gumbel":
        return -ln(-log1p_neg(u))
    if distribution == "logistic":
        return ln(u) - log1p_neg(u)
    if distribution == "laplace":
        low = u < 0.5
        size = ln(2.0 * torch.where(low, u, 1.0 - u))
        return torch.where(low, size, -size)
    raise ValueError(f"distribution={distribution!r}: expected one of {', '.join(DISTRIBUTIONS)}")


def as_key(value: int, tensor: Tensor | None, device: torch.device | None) -> Tensor:
    """A seed, stream or offset as an int64 tensor: the tensor where there is one, else the number."""
    return torch.tensor(value, dtype=torch.int64, device=device) if tensor is None else tensor.to(device)


def fill(
    shape: list[int],
    distribution: str,
    seed: int, seeds: Tensor | None,            # int64 [] or [shape[0]]; the tensor wins
    stream: int, streams: Tensor | None,
    offset: int, offsets: Tensor | None,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:                                    # shape
    """Draws in logical row-major order. With a [B] key tensor each row of dim 0 counts its own elements."""
    keys = [as_key(*k, device) for k in ((seed, seeds), (stream, streams), (offset, offsets))]
    rows = shape[0] if any(k.dim() for k in keys) else 1
    length = math.prod(shape) // rows if rows else 0
    word = words(rows, length, *keys)
    if distribution == "bits":                  # int32, the same bits
        signed = torch.where(word >= 2**31, word - 2**32, word)
        return signed[:, :length].reshape(shape).to(dtype)
    return draw(word, distribution)[:, :length].reshape(shape).to(dtype)
