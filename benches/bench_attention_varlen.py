"""Attention over ragged rows, packed: a batch of prompts and a batch of continued ones, causal.

SDPA has no such call on a CPU: it takes the rows one by one, or padded to the longest with a mask.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import onepass

from .harness import Case

HEADS, KV_HEADS, DIM = 16, 4, 64
# (queries, keys) of each row
PROMPTS = tuple((n, n) for n in (37, 512, 130, 8, 300, 1, 220, 64))
CONTINUED = tuple((q, k) for q, k in ((1, 900), (16, 700), (1, 65), (64, 1024), (1, 300), (7, 7), (1, 1500), (3, 80)))


def cases(device: torch.device) -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        yield _case("prompts", PROMPTS, dtype)
        yield _case("continued", CONTINUED, dtype)


def _seen(queries: int, keys: int, device: torch.device) -> Tensor:
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def _grouped(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """Textbook attention of [S, H, D] in one row."""
    keys, values = (x.repeat_interleave(HEADS // KV_HEADS, 1).transpose(0, 1) for x in (k, v))
    scores = (q.transpose(0, 1) @ keys.mT * DIM**-0.5).masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1) @ values).transpose(0, 1)


def _case(kind: str, rows: tuple[tuple[int, int], ...], dtype: torch.dtype) -> Case:
    queries, keys = ([row[i] for row in rows] for i in (0, 1))

    def make(device: torch.device) -> tuple:
        q = torch.randn(sum(queries), HEADS, DIM, device=device).to(dtype)
        k, v = (torch.randn(sum(keys), KV_HEADS, DIM, device=device).to(dtype) for _ in "kv")
        cu = [torch.tensor([0, *n], device=device).cumsum(0).int() for n in (queries, keys)]
        pairs = [_seen(*row, device) for row in rows]
        padded = torch.zeros(len(rows), 1, max(queries), max(keys), dtype=torch.bool, device=device)
        for b, seen in enumerate(pairs):
            padded[b, 0, : seen.shape[0], : seen.shape[1]] = seen
        padded[..., 0] = True                   # a padded query has to see something
        return q, k, v, *cu, padded

    def ours(
        q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, seen: Tensor, backend: str | None = None
    ) -> Any:
        return onepass.attention_varlen(q, k, v, cu_q, cu_k, max(queries), max(keys), causal=True, backend=backend)

    def split(q: Tensor, k: Tensor, v: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        return zip(q.split(queries), k.split(keys), v.split(keys), strict=True)

    def textbook(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, seen: Tensor) -> Tensor:
        parts = zip(split(q, k, v), rows, strict=True)
        return torch.cat([_grouped(*row, _seen(*lengths, q.device)) for row, lengths in parts])

    def by_row(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, seen: Tensor) -> Tensor:
        outs = []
        for row, (n, m) in zip(split(q, k, v), rows, strict=True):
            a, b, c = (x.transpose(0, 1)[None] for x in row)
            options: dict[str, Any] = {"is_causal": True} if n == m else {"attn_mask": _seen(n, m, q.device)}
            outs.append(F.scaled_dot_product_attention(a, b, c, enable_gqa=True, **options)[0].transpose(0, 1))
        return torch.cat(outs)

    def padded(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, seen: Tensor) -> Tensor:
        a, b, c = (pad_sequence(list(x), batch_first=True).transpose(1, 2) for x in zip(*split(q, k, v), strict=True))
        out = F.scaled_dot_product_attention(a, b, c, attn_mask=seen, enable_gqa=True).transpose(1, 2)
        return torch.cat([out[b, :n] for b, n in enumerate(queries)])

    size = dtype.itemsize
    pairs = sum(q * k - q * (q - 1) // 2 for q, k in rows)
    return Case(
        op="attention_varlen_forward",
        name=f"{kind}_{'fp32' if dtype is torch.float32 else 'bf16'}",
        shape=f"rows {len(rows)} Q{sum(queries)} K{sum(keys)} H{HEADS}/{KV_HEADS} D{DIM}",
        dtype=dtype,
        make=make,
        implementations={"onepass": ours, "eager": textbook, "SDPA by row": by_row, "SDPA, padded": padded},
        reference=functools.partial(ours, backend="reference"),
        reads=(sum(queries) * HEADS + 2 * sum(keys) * KV_HEADS) * DIM * size,
        writes=sum(queries) * HEADS * DIM * size,
        flops=4 * HEADS * DIM * pairs,
        formula="q, keys and values read once, the result written; 4 D operations a query head and key that it sees",
        quick=dtype is torch.float32 and kind == "prompts",
    )
