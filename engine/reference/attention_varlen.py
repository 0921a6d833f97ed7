"""Attention over ragged rows packed end to end, or over pages of keys, in plain PyTorch.

Rows are spread over [B, longest] and meet `attend` there, so that nothing depends on a length on the host; places that
hold no token are cleared before they meet arithmetic.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .attention import attend, attend_backward, inside
from .kvcache import read, rows_and_steps, slots_of


def attention_varlen_forward(
    q: Tensor,  # [total_q, H, D]
    k: Tensor,  # [total_k, Hkv, D], or [pages, page_size, Hkv, D] with block_table
    v: Tensor,  # as k, with head dim Dv
    cu_seqlens_q: Tensor,  # [B + 1] int32: where each row's queries start
    cu_seqlens_k: Tensor,  # [B + 1] int32: the same of keys; with pages only the differences count
    max_seqlen_q: int,
    max_seqlen_k: int,
    block_table: Tensor | None,  # [B, blocks] int32
    causal: bool,
    window_left: int,
    window_right: int,
    softcap: float,
    scale: float,
    alibi_slopes: Tensor | None = None,  # [H] or [B, H]
    sinks: Tensor | None = None,  # [H]
) -> tuple[Tensor, Tensor]:  # out [total_q, H, Dv], lse [H, total_q]
    """`attention_forward` of each row: its last query sits at its last key."""
    n_keys = cu_seqlens_k.long().diff()
    if block_table is None:
        keys, values = (_spread(x, cu_seqlens_k, max_seqlen_k) for x in (k, v))
    else:
        place = torch.arange(max_seqlen_k, device=q.device).expand(n_keys.shape[0], max_seqlen_k)
        rows = torch.arange(n_keys.shape[0], device=q.device)[:, None]
        slots, valid = slots_of(place, rows, k, block_table, None)
        keys, values = (read(x, slots, valid & (place < n_keys[:, None])) for x in (k, v))
    distance, allowed = _pairs(cu_seqlens_q, n_keys, max_seqlen_q, max_seqlen_k, causal, window_left, window_right)
    padded = _spread(q, cu_seqlens_q, max_seqlen_q)
    out, lse = attend(padded, keys, values, distance, allowed, softcap, scale, alibi_slopes, sinks, None)
    rows, steps = rows_and_steps(q, cu_seqlens_q)
    return out[rows, steps], lse.transpose(1, 2)[rows, steps].t().contiguous()


def attention_varlen_backward(
    grad_out: Tensor,  # [total_q, H, Dv]
    grad_lse: Tensor | None,  # [H, total_q]
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,  # as the forward returned it
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    window_left: int,
    window_right: int,
    softcap: float,
    scale: float,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # dq, dk, dv and dsinks (size 0 without sinks)
    """The gradient in closed form, of rows packed end to end."""
    n_keys = cu_seqlens_k.long().diff()
    distance, allowed = _pairs(cu_seqlens_q, n_keys, max_seqlen_q, max_seqlen_k, causal, window_left, window_right)
    grad, padded, result = (_spread(x, cu_seqlens_q, max_seqlen_q) for x in (grad_out, q, out))
    keys, values = (_spread(x, cu_seqlens_k, max_seqlen_k) for x in (k, v))
    lses, grad_lses = (
        None if x is None else _spread(x.t()[..., None], cu_seqlens_q, max_seqlen_q)[..., 0].transpose(1, 2)
        for x in (lse, grad_lse)
    )
    assert lses is not None
    count = cu_seqlens_q.long().diff()[:, None, None]
    lses = lses.masked_fill(torch.arange(max_seqlen_q, device=q.device) >= count, -torch.inf)  # no query: nothing flows
    dq, dk, dv, dsinks = attend_backward(
        grad, grad_lses, padded, keys, values, result, lses, distance, allowed, softcap, scale, alibi_slopes, sinks,
        None,
    )  # fmt: skip
    at_q, at_k = rows_and_steps(q, cu_seqlens_q), rows_and_steps(k, cu_seqlens_k)
    return dq[at_q], dk[at_k], dv[at_k], dsinks


def _spread(x: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
    """[total, ...] as [B, longest, ...] with zeros after each row's last token."""
    starts, step = cu_seqlens.long(), torch.arange(longest, device=x.device)
    if x.shape[0] == 0:
        return x.new_zeros(starts.shape[0] - 1, longest, *x.shape[1:])
    spread = x[(starts[:-1, None] + step).clamp(0, x.shape[0] - 1)]
    missing = step >= starts.diff()[:, None]
    return spread.masked_fill(missing.reshape(*missing.shape, *(1,) * (x.dim() - 1)), 0)


def _pairs(
    cu_seqlens_q: Tensor, n_keys: Tensor, max_seqlen_q: int, max_seqlen_k: int, causal: bool, left: int, right: int
) -> tuple[Tensor, Tensor]:  # how far key j lies before query i, and whether it is attended: [B, max_q, max_k]
    i = torch.arange(max_seqlen_q, device=n_keys.device)[:, None]
    j = torch.arange(max_seqlen_k, device=n_keys.device)
    distance = (n_keys - cu_seqlens_q.long().diff())[:, None, None] + i - j
    return distance, inside(distance, causal, left, right) & (j < n_keys[:, None, None])
