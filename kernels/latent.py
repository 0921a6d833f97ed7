"""Posterior samples with options in Triton, one pass each way; backward draws the noise again.

Bytes: forward reads mean and logvar and writes every sample, backward reads them and the samples' gradients and writes
two gradients. A program takes R short rows or one tile of a long row and walks the samples with mean and logvar in
registers. R and the tile follow from the row's length alone, and so does the order in which a row's sums are added.
Halves of one tensor are read, and their gradients written, where they lie: as segments of a row.
"""
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._native import row_length
from .._ops.latent import half_shape, term_shapes
from ..reference.latent import SAMPLE_STEP, TERMS, draws, halves
from ._host import OPTIONS, VECTOR, key_arguments, keyed_by_row, layout_of, on, power_of_two
from ._math import exp
from .reparam import sum_tiles
from .rng import _KEYS, NORMAL, draw_tile, key_of

_BLOCKS = 256       # blocks of four elements that one program takes
_NARROW = 2**30     # shortest segments whose elements are counted in int64
_STEP: tl.constexpr = tl.constexpr(SAMPLE_STEP)
_ROW: tl.constexpr = tl.constexpr(TERMS.index("row"))
_ELEMENT: tl.constexpr = tl.constexpr(TERMS.index("element"))
_WEIGHTS: tl.constexpr = tl.constexpr(TERMS.index("weights"))
_LN_2PI: tl.constexpr = tl.constexpr(1.8378770664093453)

_PLACES = [f"{name}_{part}" for name in ("mean", "logvar", "prior_mean", "prior_logvar", "noise", "grad", "to_mean",
                                         "to_logvar") for part in ("row", "segment")]
_RAW = ["rows", "units", "run_units", "tiles", "count", "noise_draw", "grad_sample", *_PLACES, *_KEYS]


@triton.jit
def _tile(
    rows, units, run_units, tiles, SEGMENTED: tl.constexpr, WIDE: tl.constexpr, UNIT: tl.constexpr, R: tl.constexpr,
    C: tl.constexpr,
):
    """(tile, rows, the same kept below the last, elements of a row, their segments, their places in those, which of
    them there are, a row's length)."""
    length = units.to(tl.int64) * UNIT
    tile = (tl.program_id(0) % tiles).to(tl.int64)
    mine = (tl.program_id(0) // tiles).to(tl.int64) * R + tl.arange(0, R)
    col = tile * (4 * C) + tl.arange(0, 4 * C)
    segment, place = col * 0, col
    if SEGMENTED:                           # counted from the tile's first segment: a short division
        run = run_units.to(tl.int64) * UNIT
        first = tile * (4 * C) // run
        kind = tl.int64 if WIDE else tl.int32
        local = (tile * (4 * C) - first * run).to(kind) + tl.arange(0, 4 * C)
        short = run.to(kind)
        segment, place = first + (local // short).to(tl.int64), (local % short).to(tl.int64)
    return tile, mine, tl.minimum(mine, rows - 1), col, segment, place, (col < length)[None, :], length


@triton.jit
def _at(row, row_step, segment, segment_step, place, UNIT: tl.constexpr):
    return row[:, None] * row_step * UNIT + (segment * segment_step * UNIT + place)[None, :]


@triton.jit
def _load(X, at, inside):
    return tl.load(X + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _element(
    Mean, mean_row, mean_segment, Logvar, logvar_row, logvar_segment, PriorMean, prior_mean_row, prior_mean_segment,
    PriorLogvar, prior_logvar_row, prior_logvar_segment, low, high, row, segment, place, inside, UNIT: tl.constexpr,
):
    """(mean, whether logvar is inside its clamp, logvar clamped, std, mean - prior's, 1 / prior's variance, prior's
    logvar, variance over prior's)."""
    m = _load(Mean, _at(row, mean_row, segment, mean_segment, place, UNIT), inside)
    lv = _load(Logvar, _at(row, logvar_row, segment, logvar_segment, place, UNIT), inside)
    free = (lv >= low) & (lv <= high)
    lv = tl.where(lv < low, low, tl.where(lv > high, high, lv))         # NaN stays NaN
    std = exp(0.5 * lv)
    if PriorMean is None:
        return m, free, lv, std, m, m * 0 + 1.0, tl.zeros_like(m), std * std
    else:
        plv = _load(PriorLogvar, _at(row, prior_logvar_row, segment, prior_logvar_segment, place, UNIT), inside)
        away = m - _load(PriorMean, _at(row, prior_mean_row, segment, prior_mean_segment, place, UNIT), inside)
        return m, free, lv, std, away, exp(plv * -1.0), plv, exp(lv - plv)


@triton.jit
def _kl(m, lv, std, away, precision, plv, ratio, PRIOR: tl.constexpr):
    if PRIOR:
        return 0.5 * tl.fma(away * away, precision, (ratio - 1.0) + (plv - lv))
    else:
        return 0.5 * tl.fma(std, std, tl.fma(m, m, -1.0 - lv))


@triton.jit(do_not_specialize=_RAW)
def sample_tiles(
    Mean, mean_row, mean_segment, Logvar, logvar_row, logvar_segment, PriorMean, prior_mean_row, prior_mean_segment,
    PriorLogvar, prior_logvar_row, prior_logvar_segment, low, high, Noise, noise_row, noise_segment, noise_draw,
    Z, First, Second, beta, free_bits, count, rows, units, run_units, tiles,
    seed: tl.int64, Seeds, seeds_step, stream: tl.int64, Streams, streams_step, offset: tl.int64, Offsets, offsets_step,
    TERMS: tl.constexpr, PAIRS: tl.constexpr, KEYED: tl.constexpr, WHOLE: tl.constexpr, SEGMENTED: tl.constexpr,
    WIDE: tl.constexpr, UNIT: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):
    tile, mine, row, col, segment, place, inside, length = _tile(
        rows, units, run_units, tiles, SEGMENTED, WIDE, UNIT, R, C
    )
    m, _free, lv, std, away, precision, plv, ratio = _element(
        Mean, mean_row, mean_segment, Logvar, logvar_row, logvar_segment, PriorMean, prior_mean_row, prior_mean_segment,
        PriorLogvar, prior_logvar_row, prior_logvar_segment, low, high, row, segment, place, inside, UNIT,
    )
    there = mine < rows
    written = inside & there[:, None]
    at = row[:, None] * length + col[None, :]
    whole = length * rows
    if First is not None and TERMS != _WEIGHTS:
        kl = _kl(m, lv, std, away, precision, plv, ratio, PriorMean is not None)
        kl = beta * tl.where(kl < free_bits, free_bits, kl)
        if TERMS == _ELEMENT:
            tl.store(First + at, kl, mask=written)
        else:
            tl.store(First + mine * tiles + tile, tl.sum(tl.where(inside, kl, 0.0), 1), mask=there)
    s, t, o = key_of(row, seed, Seeds, seeds_step, stream, Streams, streams_step, offset, Offsets, offsets_step)
    s, t, o, start = s[:, None], t[:, None], o[:, None], (row * 0 if KEYED else row * length)[:, None]
    for drawn in range(count):
        k = tl.cast(drawn, tl.int64)
        if Noise is None:
            eps = draw_tile(s, t, o + k * _STEP, start, tile, col, NORMAL, WHOLE, R, C)
        else:
            eps = _load(Noise, k * noise_draw * UNIT + _at(row, noise_row, segment, noise_segment, place, UNIT), inside)
        for negated in tl.static_range(2 if PAIRS else 1):
            sample = k * 2 + negated if PAIRS else k
            if negated:
                eps = eps * -1.0
            tl.store(Z + sample * whole + at, tl.fma(std, eps, m).to(Z.dtype.element_ty), mask=written)
            if TERMS == _WEIGHTS:
                q = tl.fma(eps, eps, lv + _LN_2PI)
                distance = tl.fma(std, eps, away)
                p = tl.fma(distance * distance, precision, plv + _LN_2PI)
                to = (sample * rows + mine) * tiles + tile
                tl.store(First + to, -0.5 * tl.sum(tl.where(inside, q, 0.0), 1), mask=there)
                tl.store(Second + to, -0.5 * tl.sum(tl.where(inside, p, 0.0), 1), mask=there)


@triton.jit(do_not_specialize=_RAW)
def sample_backward_tiles(
    GradZ, grad_row, grad_segment, grad_sample, GradFirst, GradSecond,
    Mean, mean_row, mean_segment, Logvar, logvar_row, logvar_segment, PriorMean, prior_mean_row, prior_mean_segment,
    PriorLogvar, prior_logvar_row, prior_logvar_segment, low, high, Noise, noise_row, noise_segment, noise_draw,
    ToMean, to_mean_row, to_mean_segment, ToLogvar, to_logvar_row, to_logvar_segment, ToNoise, ToPriorMean,
    ToPriorLogvar, beta, free_bits, count, rows, units, run_units, tiles,
    seed: tl.int64, Seeds, seeds_step, stream: tl.int64, Streams, streams_step, offset: tl.int64, Offsets, offsets_step,
    TERMS: tl.constexpr, PAIRS: tl.constexpr, SAMPLED: tl.constexpr, KEYED: tl.constexpr, WHOLE: tl.constexpr,
    SEGMENTED: tl.constexpr, WIDE: tl.constexpr, UNIT: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):
    tile, mine, row, col, segment, place, inside, length = _tile(
        rows, units, run_units, tiles, SEGMENTED, WIDE, UNIT, R, C
    )
    m, free, lv, std, away, precision, plv, ratio = _element(
        Mean, mean_row, mean_segment, Logvar, logvar_row, logvar_segment, PriorMean, prior_mean_row, prior_mean_segment,
        PriorLogvar, prior_logvar_row, prior_logvar_segment, low, high, row, segment, place, inside, UNIT,
    )
    written = inside & (mine < rows)[:, None]
    at = row[:, None] * length + col[None, :]
    whole = length * rows
    dm = tl.zeros([R, 4 * C], tl.float32)
    dstd = tl.zeros([R, 4 * C], tl.float32)
    dpm = tl.zeros([R, 4 * C], tl.float32)
    dplv = tl.zeros([R, 4 * C], tl.float32)
    dq = tl.zeros([R], tl.float32)
    if SAMPLED:
        s, t, o = key_of(row, seed, Seeds, seeds_step, stream, Streams, streams_step, offset, Offsets, offsets_step)
        s, t, o, start = s[:, None], t[:, None], o[:, None], (row * 0 if KEYED else row * length)[:, None]
        for drawn in range(count):
            k = tl.cast(drawn, tl.int64)
            if Noise is None:
                eps = draw_tile(s, t, o + k * _STEP, start, tile, col, NORMAL, WHOLE, R, C)
            else:
                from_noise = k * noise_draw * UNIT + _at(row, noise_row, segment, noise_segment, place, UNIT)
                eps = _load(Noise, from_noise, inside)
            deps = tl.zeros([R, 4 * C], tl.float32)
            for negated in tl.static_range(2 if PAIRS else 1):
                sample = k * 2 + negated if PAIRS else k
                if negated:
                    eps = eps * -1.0
                dz = tl.zeros([R, 4 * C], tl.float32)
                if GradZ is not None:
                    from_grad = sample * grad_sample * UNIT + _at(row, grad_row, segment, grad_segment, place, UNIT)
                    dz = _load(GradZ, from_grad, inside)
                if TERMS == _WEIGHTS and GradSecond is not None:
                    on = tl.load(GradSecond + sample * rows + row)[:, None]
                    distance = tl.fma(std, eps, away)
                    pull = on * distance * precision
                    dz -= pull
                    dpm += pull
                    dplv += 0.5 * tl.fma(pull, distance, on * -1.0)
                dm += dz
                dstd += dz * eps
                own = dz * std
                if TERMS == _WEIGHTS and GradFirst is not None:
                    on = tl.load(GradFirst + sample * rows + row)
                    dq += on
                    own -= on[:, None] * eps
                deps = deps - own if negated else deps + own
            if ToNoise is not None:
                tl.store(ToNoise + k * whole + at, deps.to(ToNoise.dtype.element_ty), mask=written)
    dlv = tl.fma(0.5 * std, dstd, (-0.5 * dq)[:, None])
    if GradFirst is not None and TERMS != _WEIGHTS:
        on = beta * (tl.load(GradFirst + row)[:, None] if TERMS == _ROW else _load(GradFirst, at, inside))
        kl = _kl(m, lv, std, away, precision, plv, ratio, PriorMean is not None)
        on = tl.where(kl >= free_bits, on, 0.0)
        slope = on * away * precision
        dm += slope
        dpm -= slope
        dlv = tl.fma(0.5 * on, ratio - 1.0, dlv)
        dplv = tl.fma(0.5 * on, 1.0 - ratio - away * away * precision, dplv)
    to_mean = _at(row, to_mean_row, segment, to_mean_segment, place, UNIT)
    to_logvar = _at(row, to_logvar_row, segment, to_logvar_segment, place, UNIT)
    tl.store(ToMean + to_mean, dm.to(ToMean.dtype.element_ty), mask=written)
    tl.store(ToLogvar + to_logvar, tl.where(free, dlv, 0.0).to(ToLogvar.dtype.element_ty), mask=written)
    if ToPriorMean is not None:
        tl.store(ToPriorMean + at, dpm.to(ToPriorMean.dtype.element_ty), mask=written)
        tl.store(ToPriorLogvar + at, dplv.to(ToPriorLogvar.dtype.element_ty), mask=written)


class _Call:
    """How a call is laid out: rows of segments, their tiles, and the arguments that both kernels share."""

    def __init__(
        self, mean: Tensor, logvar: Tensor, prior: tuple[Tensor | None, ...], noise: Tensor | None,
        keys: tuple[Any, ...], options: tuple[Any, ...], grad: Tensor | None = None, result: Tensor | None = None,
    ) -> None:
        _, low, high, samples, pairs, terms, beta, free_bits = options
        self.several, self.samples, self.count = samples > 0, max(samples, 1), draws(samples, pairs)
        self.rows, self.length = row_length(mean)
        of_rows = [x for x in (mean, logvar, *prior, *(() if samples else (noise, grad))) if x is not None]
        keyed = keyed_by_row(keys)
        written = of_rows if result is None else [*of_rows, result]
        self.flat = not keyed and terms in ("none", "element") and all(x.is_contiguous() for x in written)
        if self.flat:                                   # one row: whole blocks of random numbers, full tiles
            self.rows, self.length = 1, mean.numel()
            self.run = self.length
        else:
            self.run = min((found[0] for x in of_rows if (found := layout_of(x))), default=self.length)
            if result is not None and (found := layout_of(result)) and found[0] < self.length:
                self.run = found[0]                     # a result is written where it lies
        self.unit = VECTOR // mean.element_size() if self.run * mean.element_size() % VECTOR == 0 else 1
        c = min(_BLOCKS, power_of_two(-(-self.length // 4)))
        r = min(_BLOCKS // c, 64)
        self.tiles = -(-self.length // (4 * c))
        self.grid = (-(-self.rows // r) * self.tiles,)
        self.posterior = [part for x in (mean, logvar, *prior) for part in self.place(x)] + [low, high]
        units = self.length // self.unit, self.run // self.unit
        self.sizes = beta, free_bits, self.count, self.rows, *units, self.tiles
        self.keys = key_arguments(keys)
        self.constants = {
            "TERMS": TERMS.index(terms), "PAIRS": pairs, "KEYED": keyed,
            "WHOLE": keyed or self.rows == 1 or self.length % 4 == 0, "SEGMENTED": self.run < self.length,
            "WIDE": _NARROW <= self.run < self.length, "UNIT": self.unit, "R": r, "C": c,
            "num_warps": 4 if r * c >= 128 else 1, **OPTIONS,
        }

    def place(self, x: Tensor | None) -> tuple[Tensor | None, int, int]:
        """A tensor, or a copy, with the steps between its rows and between its segments, in units."""
        if x is None:
            return None, 0, 0
        row = segment = 0
        if not self.flat:
            layout = layout_of(x)
            if layout is None or layout[0] not in (self.run, self.length):
                x, layout = x.contiguous(), (self.length, self.length)
            row, segment = x.stride(0) if x.dim() else 0, self.run if layout[0] == self.length else layout[1]
        if self.unit > 1 and (x.data_ptr() % VECTOR or row % self.unit or segment % self.unit):
            x = x.clone(memory_format=torch.contiguous_format)
            row, segment = self.length, self.run
        return x, row // self.unit, segment // self.unit

    def sampled(self, x: Tensor | None) -> tuple[Tensor | None, int, int, int]:
        """Of a tensor with a leading dim of samples, the step between those too."""
        if x is None or not self.several:
            return *self.place(x), 0
        x = x.contiguous()
        if self.unit > 1 and x.data_ptr() % VECTOR:
            x = x.clone(memory_format=torch.contiguous_format)
        each = self.length // self.unit
        return x, each, self.run // self.unit, self.rows * each


def forward(
    mean: Tensor, logvar: Tensor | None, noise: Tensor | None, *args: Any, out: tuple[Tensor | None, ...] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    *keys, prior_mean, prior_logvar = args[:8]
    options = args[8:]
    chunk_dim, _, _, samples, _, terms, *_ = options
    shape = half_shape(mean, logvar, chunk_dim)
    given = out[0] if out is not None else None
    direct = given is not None and given.is_contiguous() and given.data_ptr() % VECTOR == 0
    z = given if direct and given is not None else mean.new_empty([samples, *shape] if samples else shape)
    first, second = (mean.new_empty(x, dtype=torch.float32) for x in term_shapes(shape, samples, terms))
    if z.numel():
        call = _Call(*halves(mean, logvar, chunk_dim), (prior_mean, prior_logvar), noise, tuple(keys), options)
        sums = [x for x in (first, second) if x.numel()] if terms in ("row", "weights") else []
        partial = [x.new_empty(*x.shape, call.tiles) for x in sums] if call.tiles > 1 else sums
        beside = [*partial, None, None][:2] if terms != "element" else [first, None]
        with on(mean):
            sample_tiles[call.grid](*call.posterior, *call.sampled(noise), z, *beside, *call.sizes, *call.keys,
                                    **call.constants)
            if call.tiles > 1:
                for of_tiles, total in zip(partial, sums, strict=True):
                    sum_tiles[(total.numel(),)](of_tiles, total, call.tiles, BLOCK=128, num_warps=1, **OPTIONS)
    else:
        first.zero_(), second.zero_()
    return (z if direct or given is None else given.copy_(z)), first, second


def backward(
    grad_z: Tensor | None, grad_first: Tensor | None, grad_second: Tensor | None, mean: Tensor, logvar: Tensor | None,
    noise: Tensor | None, *args: Any, out: None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    *keys, prior_mean, prior_logvar = args[:8]
    *options, noise_grad, prior_grad = args[8:]
    chunk_dim, _, _, samples, pairs, terms, *_ = options
    shape = half_shape(mean, logvar, chunk_dim)
    grad_mean, grad_logvar = mean.new_empty(mean.shape), mean.new_empty(0 if logvar is None else shape)
    sampled = grad_z is not None or (terms == "weights" and (grad_first is not None or grad_second is not None))
    make = mean.new_empty if sampled else mean.new_zeros
    grad_noise = make(([draws(samples, pairs), *shape] if samples else shape) if noise_grad else 0)
    grad_prior = [mean.new_empty(shape if prior_grad else 0) for _ in range(2)]
    if grad_mean.numel():
        to_mean, to_logvar = halves(grad_mean, None if logvar is None else grad_logvar, chunk_dim)
        call = _Call(*halves(mean, logvar, chunk_dim), (prior_mean, prior_logvar), noise, tuple(keys), tuple(options),
                     grad_z, to_mean)
        first, second = (None if x is None else x.float().contiguous() for x in (grad_first, grad_second))
        with on(mean):
            sample_backward_tiles[call.grid](
                *call.sampled(grad_z), first, second, *call.posterior, *call.sampled(noise), *call.place(to_mean),
                *call.place(to_logvar), grad_noise if noise_grad and sampled else None,
                *(grad_prior if prior_grad else (None, None)), *call.sizes, *call.keys, SAMPLED=sampled,
                **call.constants,
            )
    return grad_mean, grad_logvar, grad_noise, grad_prior[0], grad_prior[1]
