"""Plans, latents and the formula in plain PyTorch that the tests of denoise_step share."""
from __future__ import annotations

import torch

from onepass import DenoisePlan
from onepass.plans import Row
from onepass.plans.plan import Level

NOISE = 2 << 56         # the stream of step 0


def plan_of(*rows: Row) -> DenoisePlan:
    return DenoisePlan.build("own", rows, torch.arange(len(rows)), [Level(1.0, 1.0)] * (len(rows) + 1))


# Every feature of a row, alone and together.
ROWS = (
    Row(x=0.9, m=-0.4),
    Row(x=0.3, u=0.8, p=1.1, q=-0.6, limit=0.7),
    Row(x=0.5, m=0.2, z=0.7, number=3),
    Row(x=0.6, m=-0.3, p=0.9, q=-0.2, slot=0, history=(0.4, 0.0)),
    Row(x=0.7, m=0.1, u=0.3, z=0.2, p=0.4, q=0.8, limit=0.5, slot=1, history=(-0.3, 0.25), number=5),
    Row(z=1.0, number=6),
    Row(m=1.0),
    Row(x=1.0, history=(0.0, 2.0)),
)


PLAN = plan_of(*ROWS)


def inputs(shape, dtype=torch.float32, seed=0, device="cpu"):
    """sample, uncond, cond, noise, known, state, mask"""
    g = torch.Generator().manual_seed(seed)
    randn = lambda size: torch.randn(size, generator=g).to(device, dtype)
    mask = torch.rand(shape, generator=g)
    mask = torch.where(mask < 0.3, 0.0, torch.where(mask > 0.7, 1.0, mask)).to(device, dtype)
    return (*(randn(shape) for _ in range(5)), randn((shape[0], PLAN.slots, *shape[1:])), mask)


def plain(x, u, c, z, known, state, mask, row, g):
    """What one writes without onepass, of one row of the batch; the state is changed."""
    m = u + g * (c - u)
    kept = torch.clamp(row.p * x + row.q * m, -row.limit, row.limit)
    prev = row.x * x + row.m * m + row.u * kept + row.z * z
    for j, h in enumerate(row.history):
        prev = prev + h * state[j]
    if row.slot >= 0:
        state[row.slot] = kept
    return mask * prev + (1 - mask) * known


def plain_batch(tensors, steps, guidance):
    return torch.stack([plain(*(t[b] for t in tensors), ROWS[s], guidance[b]) for b, s in enumerate(steps)])
