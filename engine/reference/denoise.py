"""One denoising step of a batch whose rows may be at different steps of different samplers.

Every sampler is the same affine form with its own coefficients (DDIM arXiv:2010.02502, DDPM arXiv:2006.11239, Euler
arXiv:2206.00364, DPM-Solver++ arXiv:2211.01095, flow matching arXiv:2403.03206). With the coefficients of a row's step:

    m    = uncond + guidance (cond - uncond)                        classifier-free guidance, arXiv:2207.12598
    u    = clamp(p x + q m, -limit, limit)                          as a rule the predicted clean sample
    prev = X x + M m + U u + Z z + sum_j H_j history_j
    history_slot = u
    prev = known + mask (prev - known)                              inpainting

An operand whose coefficient is exactly 0 is not read: NaN there changes nothing.
"""
from __future__ import annotations

import torch
from torch import Tensor

from . import rng

# Columns of the table; those of the history follow. As in plans/plan.py.
X, M, U, Z, P, Q, LIMIT, SLOT, NUMBER, HISTORY = range(10)
STREAM_TAG = 2      # bits 56 to 63 of the stream; the bits below are the step within its own schedule


def denoise_step(
    sample: Tensor,             # [B, ...]
    model_output: Tensor,       # [B, ...] float; without guidance m, else the unconditional one
    cond: Tensor | None,        # as model_output: the conditional one
    table: Tensor,              # [rows, 9 + slots] float64
    step: int,                  # row of the table, where steps is None
    steps: Tensor | None,       # int64 [] or [B]
    state: Tensor | None,       # [B, slots, ...] as sample; written
    guidance: float,            # where guidances is None
    guidances: Tensor | None,   # [] or [B]
    seed: int,                  # where seeds is None
    seeds: Tensor | None,       # int64 [] or [B]
    noise: Tensor | None,       # as sample; None draws it where a row needs it
    stochastic: bool,           # whether any row of the table needs noise
    mask: Tensor | None,        # bool or float, broadcasts to sample: 1 keeps the new value, 0 takes `known`
    known: Tensor | None,       # as sample
) -> Tensor:                    # as sample, contiguous
    dtype = torch.promote_types(sample.dtype, torch.float32)
    rows = table[step] if steps is None else table[steps]
    column = lambda i: rows[..., i].to(dtype).reshape(-1, *(1,) * (sample.dim() - 1))
    x, m = sample.to(dtype), model_output.to(dtype)
    if cond is not None:
        m = _guided(m, cond.to(dtype), guidance, guidances)
    u = _term(column(P), x) + _term(column(Q), m)
    u = torch.clamp(u, -column(LIMIT), column(LIMIT))
    prev = _term(column(X), x) + _term(column(M), m) + _term(column(U), u)
    if stochastic:
        z = _noise(sample, rows, seed, seeds) if noise is None else noise
        prev = prev + _term(column(Z), z.to(dtype))
    if state is not None:
        for j in range(state.shape[1]):
            prev = prev + _term(column(HISTORY + j), state[:, j].to(dtype))
        for j in range(state.shape[1]):
            state[:, j] = torch.where(column(SLOT) == j, u.to(state.dtype), state[:, j])
    if mask is not None and known is not None:
        prev = _blend(mask, prev, known.to(dtype))
    return prev.to(sample.dtype).contiguous()


def _term(coefficient: Tensor, operand: Tensor) -> Tensor:
    return torch.where(coefficient != 0, coefficient * operand, 0.0)


def _guided(uncond: Tensor, cond: Tensor, guidance: float, guidances: Tensor | None) -> Tensor:
    if guidances is None:
        g = torch.tensor(guidance, dtype=uncond.dtype, device=uncond.device)
    else:
        g = guidances.to(uncond.dtype).reshape(-1, *(1,) * (uncond.dim() - 1))
    mixed = uncond + g * (cond - uncond)
    return torch.where(g == 0, uncond, torch.where(g == 1, cond, mixed))


def _blend(mask: Tensor, new: Tensor, known: Tensor) -> Tensor:
    weight = mask.to(new.dtype)
    mixed = known + weight * (new - known)
    return torch.where(weight == 0, known, torch.where(weight == 1, new, mixed))


def _noise(sample: Tensor, rows: Tensor, seed: int, seeds: Tensor | None) -> Tensor:
    """float32 normals. With seeds [B] a row counts its own elements, else the elements of the batch are counted."""
    batch = sample.shape[0]
    length = sample[0].numel() if batch else 0
    key = rng.as_key(seed, seeds, sample.device)
    stream = rows[..., NUMBER].to(torch.int64) + (STREAM_TAG << 56)
    first = torch.zeros_like(key) if key.dim() else torch.arange(batch, device=sample.device) * length
    count = length if key.dim() else length + 3                     # a row may begin inside a block of four
    drawn = rng.draw(rng.words(batch, count, key, stream, first // 4), "normal")
    place = (first % 4).reshape(-1, 1) + torch.arange(length, device=sample.device)
    return drawn.gather(1, place.expand(batch, length)).reshape(sample.shape)
