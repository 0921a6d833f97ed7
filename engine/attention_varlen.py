"""Attention over rows of different lengths, packed end to end without padding."""
from __future__ import annotations

import torch
from torch import Tensor

from . import _attention_checks as expect
from . import _checks as check
from ._ops import keep, recall, route, signature
from .attention import autocast


def attention_varlen(
    q: Tensor,                              # [total_q, H, D], D from 1 to 256
    k: Tensor,                              # [total_k, Hkv, D], or [pages, page_size, Hkv, D] with block_table
    v: Tensor,                              # as k, with head dim Dv
    cu_seqlens_q: Tensor,                   # int32 [B + 1]: row b has queries cu_seqlens_q[b] to cu_seqlens_q[b + 1]
    cu_seqlens_k: Tensor,                   # int32 [B + 1]: and keys likewise; with pages its differences count
    max_seqlen_q: int,                      # at least the longest row
    max_seqlen_k: int,
    *,
    block_table: Tensor | None = None,      # int32 [B, blocks]: the pages of each row, of any size
    causal: bool = False,                   # query i of a row sees its keys up to i + n_keys - n_queries
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    scale: float | None = None,
    alibi_slopes: Tensor | None = None,     # [H] or [B, H]
    sinks: Tensor | None = None,            # [H]
    return_lse: bool = False,
    out: Tensor | None = None,              # [total_q, H, Dv]; not together with a gradient
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:        # [total_q, H, Dv], with return_lse also [H, total_q] float32
    """`attention` of every row alone, with the same bits; options, LSE and rows without keys are as there.

    Gradients flow to q, k, v and sinks; pages are for inference. Slots of pages beyond a row's keys are never read.
    Raises ValueError or TypeError before anything is written; cu_seqlens and pages on a GPU are not read.
    """
    key = signature(
        "varlen", q, k, v, cu_seqlens_q, cu_seqlens_k, block_table, causal, window, softcap, scale, alibi_slopes, sinks,
        out, backend,
    )
    if (known := recall(key)) is None:
        q, k, v, options = _checked(
            q, k, v, cu_seqlens_q, cu_seqlens_k, block_table, window, softcap, scale, alibi_slopes, sinks, out
        )
    else:
        run, options = known
    for name, longest in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if isinstance(longest, bool) or not isinstance(longest, (int, torch.SymInt)):
            raise TypeError(f"{name} is {type(longest).__name__}, expected an int")
        if longest < 0:
            raise ValueError(f"{name}={longest}: expected 0 or more")
    expect.varlen_values(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_table)
    args = (
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_table, causal, *options, alibi_slopes,
        sinks,
    )
    if known is None:
        run = route("attention_varlen_forward", args, backend)
        keep(key, (run, options))
    result, lse = run(*args) if out is None else run(*args, out=(out, None))
    return (result, lse) if return_lse else result


def _checked(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, block_table: Tensor | None,
    window: tuple[int, int], softcap: float, scale: float | None, alibi_slopes: Tensor | None, sinks: Tensor | None,
    out: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, tuple[int, int, float, float]]:
    """q, k and v as they are to be read, and (window_left, window_right, softcap, scale)."""
    paged = block_table is not None
    layout = "pages, page_size, Hkv, D" if paged else "total, Hkv, D"
    for name, x in (("q", q), ("k", k), ("v", v)):
        expect.is_rank(name, x, "total, H, D" if name == "q" else layout)
    q, k, v = autocast(q, k, v)
    for name, x in (("k", k), ("v", v)):
        expect.same_kind(name, x, "q", q)
    for dim in range(k.dim() - 2):
        expect.is_size("v", v, dim, k.shape[dim], "as k")
    expect.heads(q, k, v, ("k", "v"))
    if not isinstance(cu_seqlens_q, Tensor) or cu_seqlens_q.dim() != 1 or cu_seqlens_q.shape[0] < 1:
        raise ValueError("cu_seqlens_q: expected an int32 tensor [B + 1]")
    batch = cu_seqlens_q.shape[0] - 1
    for name, cu in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        expect.is_index(name, cu, (batch + 1,), q, f"[B + 1] = [{batch + 1}]")
    if cu_seqlens_k is None:
        raise TypeError("cu_seqlens_k is None, expected an int32 tensor [B + 1]")
    expect.is_index("block_table", block_table, (batch, None), q, f"[B, blocks] with B = {batch}")
    options = expect.options(window, softcap, scale, q.shape[-1])
    expect.per_head(q, q.shape[1], batch, alibi_slopes, sinks)
    if paged:
        for name, tensor in (("q", q), ("k", k), ("v", v), ("sinks", sinks)):
            if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
                raise ValueError(f"{name} requires a gradient: pages are for inference, call it under torch.no_grad()")
    check.is_out(out, (*q.shape[:-1], v.shape[-1]), q.dtype, q.device)
    return q, k, v, options


__all__ = ["attention_varlen"]
