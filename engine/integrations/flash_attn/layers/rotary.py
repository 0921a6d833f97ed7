"""As flash_attn.layers.rotary."""
from __future__ import annotations

import torch
from torch import Tensor

from .... import _attention_checks as expect
from .... import _checks as check
from ....reference.kvcache import rotate, rows_and_steps


def apply_rotary_emb(x, cos, sin, interleaved=False, inplace=False, seqlen_offsets: int | Tensor = 0,
                     cu_seqlens: Tensor | None = None, max_seqlen: int | None = None):
    """Turns the first rotary_dim channels of x [B, S, H, D], or of [total, H, D] with cu_seqlens [B + 1].

    cos and sin are [positions, rotary_dim / 2]; token i of row b turns by position seqlen_offsets (or its [b]) + i.
    Pairs are (i, i + rotary_dim / 2), or neighbours when interleaved. Gradients flow to x, cos and sin.
    """
    expect.is_rank("x", x, "B, S, H, D" if cu_seqlens is None else "total, H, D")
    expect.is_rank("cos", cos, "positions, rotary_dim / 2")
    if cos.shape != sin.shape or 2 * cos.shape[1] > x.shape[-1]:
        raise ValueError(
            f"cos has shape {tuple(cos.shape)} and sin {tuple(sin.shape)}, expected the same, at most D / 2 ="
            f" {x.shape[-1] // 2} wide"
        )
    rows, steps = rows_and_steps(x, cu_seqlens)
    offsets = seqlen_offsets.long()[rows] if isinstance(seqlen_offsets, Tensor) else seqlen_offsets
    position = (steps + offsets).expand(x.shape[:-2])
    if check.checkable(position) and position.numel():
        first, last = (int(p) for p in torch.aminmax(position))
        if first < 0 or last >= cos.shape[0]:
            raise ValueError(f"cos has {cos.shape[0]} positions, this call reaches {first} to {last}")
    out = rotate(x, position, cos, sin, interleaved)
    return x.copy_(out) if inplace else out


__all__ = ["apply_rotary_emb"]
