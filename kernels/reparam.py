"""Reparameterized sampling in Triton, one pass each way; backward draws the noise again.

Bytes: forward reads mean and logvar and writes z (12 an element in float32), backward reads grad_z, mean and logvar
and writes two gradients (20). A program takes R short rows or one tile of a long row; R and the tile follow from the
row's length alone, and so does the order in which a row's KL is summed.
"""
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._host import OPTIONS, VECTOR, aligned, key_arguments, keyed_by_row, on, power_of_two, rows_of
from ._math import exp
from .rng import _KEYS, NORMAL, draw_tile, key_of

_BLOCKS = 256       # blocks of four elements that one program takes
_RAW = ["rows", "units", "tiles", "mean_step", "logvar_step", "noise_step", "grad_step", *_KEYS]


@triton.jit
def _tile(rows, units, tiles, UNIT: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """(tile, rows, the same kept below the last, elements of a row, which of them there are, a row's length)."""
    length = units.to(tl.int64) * UNIT
    tile = (tl.program_id(0) % tiles).to(tl.int64)
    mine = (tl.program_id(0) // tiles).to(tl.int64) * R + tl.arange(0, R)
    col = tile * (4 * C) + tl.arange(0, 4 * C)
    return tile, mine, tl.minimum(mine, rows - 1), col, (col < length)[None, :], length


@triton.jit
def _load(X, step, row, col, inside, UNIT: tl.constexpr):
    return tl.load(X + row[:, None] * step * UNIT + col[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _noise(
    Noise, noise_step, tile, row, col, inside, length,
    seed, Seeds, seeds_step, stream, Streams, streams_step, offset, Offsets, offsets_step,
    KEYED: tl.constexpr, WHOLE: tl.constexpr, UNIT: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):
    """float32 normals [R, 4 C] of a tile: those given, else those of each row's own random numbers."""
    if Noise is not None:
        return _load(Noise, noise_step, row, col, inside, UNIT)
    else:
        s, t, o = key_of(row, seed, Seeds, seeds_step, stream, Streams, streams_step, offset, Offsets, offsets_step)
        start = (row * 0 if KEYED else row * length)[:, None]
        return draw_tile(s[:, None], t[:, None], o[:, None], start, tile, col, NORMAL, WHOLE, R, C)


@triton.jit(do_not_specialize=_RAW)
def forward_tiles(
    Mean, mean_step, Logvar, logvar_step, Noise, noise_step, Z, Kl, rows, units, tiles,
    seed: tl.int64, Seeds, seeds_step, stream: tl.int64, Streams, streams_step, offset: tl.int64, Offsets, offsets_step,
    KEYED: tl.constexpr, WHOLE: tl.constexpr, UNIT: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):
    tile, mine, row, col, inside, length = _tile(rows, units, tiles, UNIT, R, C)
    m = _load(Mean, mean_step, row, col, inside, UNIT)
    lv = _load(Logvar, logvar_step, row, col, inside, UNIT)
    eps = _noise(
        Noise, noise_step, tile, row, col, inside, length, seed, Seeds, seeds_step, stream, Streams, streams_step,
        offset, Offsets, offsets_step, KEYED, WHOLE, UNIT, R, C,
    )
    std = exp(0.5 * lv)
    at = row[:, None] * length + col[None, :]
    tl.store(Z + at, tl.fma(std, eps, m).to(Z.dtype.element_ty), mask=inside & (mine < rows)[:, None])
    if Kl is not None:
        twice = tl.fma(std, std, tl.fma(m, m, -1.0 - lv))
        total = tl.sum(tl.where(inside, twice, 0.0), 1)
        tl.store(Kl + mine * tiles + tile, 0.5 * total, mask=mine < rows)


@triton.jit(do_not_specialize=["tiles"])
def sum_tiles(Partial, Total, tiles, BLOCK: tl.constexpr):
    """A row's tiles in ascending order, in float64."""
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float64)
    for i in range(0, tiles, BLOCK):
        at = i + tl.arange(0, BLOCK)
        total += tl.load(Partial + row * tiles + at, mask=at < tiles, other=0.0).to(tl.float64)
    tl.store(Total + row, tl.sum(total, 0).to(tl.float32))


@triton.jit(do_not_specialize=_RAW)
def backward_tiles(
    GradZ, grad_step, GradKl, Mean, mean_step, Logvar, logvar_step, Noise, noise_step, GradMean, GradLogvar, GradNoise,
    rows, units, tiles,
    seed: tl.int64, Seeds, seeds_step, stream: tl.int64, Streams, streams_step, offset: tl.int64, Offsets, offsets_step,
    KEYED: tl.constexpr, WHOLE: tl.constexpr, UNIT: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):
    tile, mine, row, col, inside, length = _tile(rows, units, tiles, UNIT, R, C)
    written = inside & (mine < rows)[:, None]
    at = row[:, None] * length + col[None, :]
    std = exp(0.5 * _load(Logvar, logvar_step, row, col, inside, UNIT))
    dm = tl.zeros([R, 4 * C], tl.float32)
    dlv = tl.zeros([R, 4 * C], tl.float32)
    if GradZ is not None:
        dm = _load(GradZ, grad_step, row, col, inside, UNIT)
        eps = _noise(
            Noise, noise_step, tile, row, col, inside, length, seed, Seeds, seeds_step, stream, Streams, streams_step,
            offset, Offsets, offsets_step, KEYED, WHOLE, UNIT, R, C,
        )
        if GradNoise is not None:
            tl.store(GradNoise + at, (dm * std).to(GradNoise.dtype.element_ty), mask=written)
        dlv = 0.5 * dm * std * eps
    if GradKl is not None:
        dkl = tl.load(GradKl + row)[:, None]
        dm = tl.fma(dkl, _load(Mean, mean_step, row, col, inside, UNIT), dm)
        dlv = tl.fma(0.5 * dkl, tl.fma(std, std, std * 0 - 1.0), dlv)
    tl.store(GradMean + at, dm.to(GradMean.dtype.element_ty), mask=written)
    tl.store(GradLogvar + at, dlv.to(GradLogvar.dtype.element_ty), mask=written)


class _Call:
    """How a call is laid out: rows, their tiles, and the arguments that both kernels share."""

    def __init__(self, mean: Tensor, keys: tuple[Any, ...], by_row: bool, *others: Tensor | None) -> None:
        self.keyed = keyed_by_row(keys)
        rows = mean.shape[0] if mean.dim() else 1
        if not (by_row or self.keyed) and all(x is None or x.is_contiguous() for x in (mean, *others)):
            rows = 1                                    # one row: whole blocks of random numbers, full tiles
        self.rows, self.length = rows, mean.numel() // rows
        blocks = -(-self.length // 4)
        self.c = min(_BLOCKS, power_of_two(blocks))
        self.r = min(_BLOCKS // self.c, 64)
        self.tiles = -(-self.length // (4 * self.c))
        self.unit = VECTOR // mean.element_size() if aligned(mean, self.length) else 1
        self.grid = (-(-rows // self.r) * self.tiles,)
        self.keys = key_arguments(keys)
        self.constants = {
            "KEYED": self.keyed, "WHOLE": self.keyed or rows == 1 or self.length % 4 == 0, "UNIT": self.unit,
            "R": self.r, "C": self.c, "num_warps": 4 if self.r * self.c >= 128 else 1, **OPTIONS,
        }

    def rows_in(self, x: Tensor | None) -> tuple[Tensor | None, int]:
        """A tensor and the step between its rows, in units."""
        if x is None:
            return None, 0
        x, step = rows_of(x.reshape(self.rows, -1) if self.rows == 1 else x, self.length)
        return x, step // self.unit

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.rows, self.length // self.unit, self.tiles


def forward(
    mean: Tensor, logvar: Tensor, noise: Tensor | None, *args: Any, out: tuple[Tensor | None, ...] | None = None
) -> tuple[Tensor, Tensor]:
    *keys, kl = args
    given = out[0] if out is not None else None
    direct = given is not None and given.is_contiguous() and given.data_ptr() % VECTOR == 0
    z = given if direct and given is not None else torch.empty(mean.shape, dtype=mean.dtype, device=mean.device)
    rows = mean.shape[0] if mean.dim() else 1
    total = torch.empty(rows if kl else 0, dtype=torch.float32, device=mean.device)
    if mean.numel():
        call = _Call(mean, tuple(keys), kl, logvar, noise)
        inputs = [part for x in (mean, logvar, noise) for part in call.rows_in(x)]
        partial = torch.empty(rows, call.tiles, dtype=torch.float32, device=mean.device) if call.tiles > 1 else total
        with on(mean):
            forward_tiles[call.grid](*inputs, z, partial if kl else None, *call.sizes, *call.keys, **call.constants)
            if kl and call.tiles > 1:
                sum_tiles[(rows,)](partial, total, call.tiles, BLOCK=128, num_warps=1, **OPTIONS)
    elif kl:
        total.zero_()
    return (z if direct or given is None else given.copy_(z)), total


def backward(
    grad_z: Tensor | None, grad_kl: Tensor | None, mean: Tensor, logvar: Tensor, noise: Tensor | None, *args: Any,
    out: None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    *keys, noise_grad = args
    fresh = lambda: torch.empty(mean.shape, dtype=mean.dtype, device=mean.device)
    grad_mean, grad_logvar = fresh(), fresh()
    grad_noise = fresh() if noise_grad else mean.new_empty(0)
    if noise_grad and grad_z is None:
        grad_noise.zero_()
    if mean.numel():
        call = _Call(mean, tuple(keys), grad_kl is not None, logvar, noise, grad_z)
        z, m, lv, eps = (call.rows_in(x) for x in (grad_z, mean, logvar, noise))
        with on(mean):
            backward_tiles[call.grid](
                *z, None if grad_kl is None else grad_kl.contiguous(), *m, *lv, *eps, grad_mean, grad_logvar,
                grad_noise if noise_grad else None, *call.sizes, *call.keys, **call.constants,
            )
    return grad_mean, grad_logvar, grad_noise
