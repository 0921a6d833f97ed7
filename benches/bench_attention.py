"""Attention: decoding over 4096 keys (plain and paged), eight queries at once, causal prefill.

Everybody gets keys and values as a cache holds them, [B, S, H, D] with 8 heads for 32 of the queries. SDPA is shown in
each way there is to tell it so: enable_gqa, heads repeated in the call, the queries of a group as rows of one head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import onepass

from .harness import Case
from .peers import sdpa_backends

KEYS, HEADS, KV_HEADS, DIM = 4096, 32, 8, 128
PAGE = 16


def cases(device: torch.device) -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        yield _case("decode", device, dtype)
        yield _case("paged", device, dtype, page=PAGE)
    yield _case("decode_q8", device, torch.bfloat16, queries=8)
    for dtype in (torch.float32, torch.bfloat16):
        yield _case("prefill", device, dtype, queries=1024, keys=1024, heads=8, kv_heads=8, dim=64)


def _folded(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """[B, Hkv, group * Sq, D] and [B, Hkv, Sk, D]: the queries that share keys as rows of one head."""
    return q.unflatten(2, (k.shape[2], -1)).permute(0, 2, 3, 1, 4).flatten(2, 3), k.transpose(1, 2), v.transpose(1, 2)


def _unfolded(out: Tensor, q: Tensor) -> Tensor:
    return out.unflatten(2, (-1, q.shape[1])).permute(0, 3, 1, 2, 4).flatten(2, 3)


def _textbook(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Tensor:
    rows, keys, values = _folded(q, k, v)
    scores = rows @ keys.mT * q.shape[-1] ** -0.5
    if seen is not None:
        scores = scores.masked_fill(~seen.repeat(rows.shape[2] // q.shape[1], 1), -torch.inf)
    return _unfolded(scores.softmax(-1) @ values, q)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, **options: Any) -> Tensor:
    square = seen is not None and seen.shape[0] == seen.shape[1]
    options |= {"is_causal": True} if square else {"attn_mask": seen}
    rows, keys, values = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(rows, keys, values, **options).transpose(1, 2)


def _sdpa_gqa(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Tensor:
    return _sdpa(q, k, v, seen, enable_gqa=True)


def _sdpa_repeated(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Tensor:
    group = q.shape[2] // k.shape[2]
    return _sdpa(q, k.repeat_interleave(group, 2), v.repeat_interleave(group, 2), seen)


def _sdpa_folded(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Tensor:
    rows, keys, values = _folded(q, k, v)
    seen = None if seen is None else seen.repeat(rows.shape[2] // q.shape[1], 1)
    return _unfolded(F.scaled_dot_product_attention(rows, keys, values, attn_mask=seen), q)


def _case(
    kind: str, device: torch.device, dtype: torch.dtype, queries: int = 1, keys: int = KEYS, heads: int = HEADS,
    kv_heads: int = KV_HEADS, dim: int = DIM, page: int = 0,
) -> Case:
    causal = queries > 1

    def make(device: torch.device) -> tuple:
        cache = (keys // page, page) if page else (1, keys)
        q = torch.randn(1, queries, heads, dim, device=device).to(dtype)
        k, v = (torch.randn(*cache, kv_heads, dim, device=device).to(dtype) for _ in "kv")
        if page:
            return q, k, v, torch.randperm(keys // page, device=device).int()[None]
        seen = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries) if causal else None
        return q, k, v, seen

    def ours(q: Tensor, k: Tensor, v: Tensor, last: Tensor | None, backend: str | None = None) -> Any:
        if page:
            return onepass.attention_with_kvcache(q, k, v, cache_seqlens=keys, block_table=last, backend=backend)
        return onepass.attention(q, k, v, causal=causal, backend=backend)

    def whole(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """With pages: gathers them first, as code without a paged kernel has to."""

        def gathered(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
            return attend(q, k[table].flatten(1, 2), v[table].flatten(1, 2), None)

        return gathered if page else attend

    runs = {"onepass": ours, "eager": whole(_textbook), "SDPA": whole(_sdpa_gqa)}
    if heads != kv_heads:
        runs |= {"SDPA, repeated heads": whole(_sdpa_repeated), "SDPA, folded heads": whole(_sdpa_folded)}
    runs |= sdpa_backends(device, whole(_sdpa_gqa))
    size = dtype.itemsize
    return Case(
        op="kvcache_attention" if page else "attention",
        name=f"{kind}_{'fp32' if dtype is torch.float32 else 'bf16'}",
        shape=f"B1 Q{queries} K{keys} H{heads}/{kv_heads} D{dim}" + (f" page {page}" if page else ""),
        dtype=dtype,
        make=make,
        implementations=runs,
        reference=lambda q, k, v, last: ours(q, k, v, last, backend="reference"),
        reads=(queries * heads + 2 * keys * kv_heads) * dim * size,
        writes=queries * heads * dim * size,
        flops=4 * heads * dim * queries * keys // (2 if queries == keys else 1),
        formula="q, keys and values read once, the result written; 4 D operations a query head and key, causal half",
        quick=dtype is torch.bfloat16,
    )
