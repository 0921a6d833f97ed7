"""One denoising step in Triton, one pass: the formula of engine/reference/denoise.py.

Bytes: sample, model output and result (12 an element in float32), 4 more with guidance or given noise and 8 with
history. A program takes one tile of one row and reads that row's coefficients on the device; an operand whose
coefficient is 0 is masked off, so it costs no traffic and its NaN changes nothing. A step outside the table gives NaN
and leaves the state as it was.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._native import by_rows, is_writable, mask_rows
from ..reference import denoise as reference
from ._host import OPTIONS, on, power_of_two
from .rng import NORMAL, draw, draw_at

X: tl.constexpr = tl.constexpr(reference.X)
M: tl.constexpr = tl.constexpr(reference.M)
U: tl.constexpr = tl.constexpr(reference.U)
Z: tl.constexpr = tl.constexpr(reference.Z)
P: tl.constexpr = tl.constexpr(reference.P)
Q: tl.constexpr = tl.constexpr(reference.Q)
LIMIT: tl.constexpr = tl.constexpr(reference.LIMIT)
SLOT: tl.constexpr = tl.constexpr(reference.SLOT)
NUMBER: tl.constexpr = tl.constexpr(reference.NUMBER)
HISTORY: tl.constexpr = tl.constexpr(reference.HISTORY)
STREAM: tl.constexpr = tl.constexpr(reference.STREAM_TAG << 56)

_BLOCKS = 256       # blocks of four elements that one program takes


@triton.jit
def _coefficient(Row, i, known):
    return tl.load(Row + i, mask=known, other=0.0).to(tl.float32)


@triton.jit
def _operand(Pointer, at, needed, inside):
    return tl.load(Pointer + at, mask=inside & needed, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["step", "seed", "table_rows", "tiles"])
def denoise_tiles(
    Sample, sample_step, Model, model_step, Cond, cond_step, Noise, noise_step, Known, known_step, Mask, mask_step,
    mask_period, State, Out, out_step, Table, table_rows, step: tl.int64, Steps, steps_step, guidance, Guidances,
    guidances_step, seed: tl.int64, Seeds, seeds_step, length, tiles,
    SLOTS: tl.constexpr, STOCHASTIC: tl.constexpr, KEYED: tl.constexpr, WHOLE: tl.constexpr, C: tl.constexpr,
):
    row = (tl.program_id(0) // tiles).to(tl.int64)
    tile = (tl.program_id(0) % tiles).to(tl.int64)
    at = tile * (4 * C) + tl.arange(0, 4 * C)
    inside = at < length

    place = step if Steps is None else tl.load(Steps + row * steps_step)
    known = (place >= 0) & (place < table_rows)
    Row = Table + place * (HISTORY + SLOTS)
    cx, cm, cu = _coefficient(Row, X, known), _coefficient(Row, M, known), _coefficient(Row, U, known)
    cp, cq = _coefficient(Row, P, known), _coefficient(Row, Q, known)
    limit = _coefficient(Row, LIMIT, known)
    slot = tl.load(Row + SLOT, mask=known, other=-1.0).to(tl.int64)
    u_counts = (cu != 0) | (slot >= 0)

    x = _operand(Sample + row * sample_step, at, (cx != 0) | (u_counts & (cp != 0)), inside)
    reads_m = (cm != 0) | (u_counts & (cq != 0))
    if Cond is None:
        m = _operand(Model + row * model_step, at, reads_m, inside)
    else:
        g = guidance + cx * 0 if Guidances is None else tl.load(Guidances + row * guidances_step)
        uncond = _operand(Model + row * model_step, at, reads_m & (g != 1), inside)
        cond = _operand(Cond + row * cond_step, at, reads_m & (g != 0), inside)
        mixed = tl.fma(uncond * 0 + g, cond - uncond, uncond)
        m = tl.where(g == 0, uncond, tl.where(g == 1, cond, mixed))

    zero = tl.zeros([4 * C], tl.float32)
    prev = tl.where(cx != 0, cx * x, 0.0)
    prev = tl.where(cm != 0, tl.fma(zero + cm, m, prev), prev)
    u = tl.where(cp != 0, cp * x, 0.0)
    u = tl.where(cq != 0, tl.fma(zero + cq, m, u), u)
    u = tl.where(u < -limit, -limit, tl.where(u > limit, limit, u))         # keeps NaN
    prev = tl.where(cu != 0, tl.fma(zero + cu, u, prev), prev)
    if STOCHASTIC:
        cz = _coefficient(Row, Z, known)
        if cz != 0:
            if Noise is None:
                s = (row * 0 + seed).to(tl.int64) if Seeds is None else tl.load(Seeds + row * seeds_step)
                t = tl.load(Row + NUMBER, mask=known, other=0.0).to(tl.int64) + STREAM
                start = row * 0 if KEYED else row * length
                if WHOLE:
                    z = draw(s, t, start // 4 + tile * C + tl.arange(0, C), NORMAL).reshape(4 * C)
                else:
                    z = draw_at(s, t, row * 0, start + at, NORMAL)
            else:
                z = _operand(Noise + row * noise_step, at, cz != 0, inside)
            prev = tl.fma(zero + cz, z, prev)
    if State is not None:
        for j in tl.static_range(SLOTS):
            h = _coefficient(Row, HISTORY + j, known)
            prev = tl.fma(zero + h, _operand(State + (row * SLOTS + j) * length, at, h != 0, inside), prev)
        tl.store(State + (row * SLOTS + slot) * length + at, u.to(State.dtype.element_ty), mask=inside & (slot >= 0))
    if Mask is not None:
        weight = tl.load(Mask + row * mask_step + at % mask_period, mask=inside, other=0).to(tl.float32)
        old = tl.load(Known + row * known_step + at, mask=inside & (weight != 1), other=0.0).to(tl.float32)
        prev = tl.where(weight == 0, old, tl.where(weight == 1, prev, tl.fma(weight, prev - old, old)))
    prev = tl.where(known, prev, float("nan"))
    tl.store(Out + row * out_step + at, prev.to(Out.dtype.element_ty), mask=inside)


def denoise_step(
    sample: Tensor, model_output: Tensor, cond: Tensor | None, table: Tensor,
    step: int, steps: Tensor | None, state: Tensor | None,
    guidance: float, guidances: Tensor | None, seed: int, seeds: Tensor | None,
    noise: Tensor | None, stochastic: bool, mask: Tensor | None, known: Tensor | None, out: Tensor | None = None,
) -> Tensor:
    batch = sample.shape[0]
    length = sample.numel() // batch if batch else 0
    rows = lambda x: (None, 0) if x is None else by_rows(x, length)
    direct = out is not None and is_writable(out)
    result = out if direct and out is not None else torch.empty(sample.shape, dtype=sample.dtype, device=sample.device)
    if not sample.numel():
        return result
    weights, mask_step, period = (None, 0, 1) if mask is None else mask_rows(mask, sample)
    if weights is not None and weights.dtype == torch.bool:
        weights = weights.view(torch.uint8)
    scales = None if guidances is None else guidances.float()
    row_step = lambda x: x.stride(0) if x is not None and x.dim() else 0
    c = min(_BLOCKS, power_of_two(-(-length // 4)))
    tiles = -(-length // (4 * c))
    keyed = seeds is not None and seeds.dim() == 1
    with on(sample):
        denoise_tiles[(batch * tiles,)](
            *rows(sample), *rows(model_output), *rows(cond), *rows(noise), *rows(known), weights, mask_step, period,
            state, result, rows(result)[1], table.contiguous(), table.shape[0], step, steps, row_step(steps),
            float(guidance), scales, row_step(scales), seed, seeds, row_step(seeds), length, tiles,
            SLOTS=table.shape[1] - reference.HISTORY, STOCHASTIC=stochastic, KEYED=keyed,
            WHOLE=keyed or batch == 1 or length % 4 == 0, C=c, num_warps=4 if c >= 128 else 1, **OPTIONS,
        )
    if state is not None:
        torch.autograd.graph.increment_version(state)
    return result if direct or out is None else out.copy_(result)
