"""Attention: decoding over 4096 keys (plain, paged, int8, one row and eight), some queries at once, causal prefill,
the cost of a call, the join of parts.

Everybody gets keys and values as a cache holds them, [B, S, H, D] with 8 heads for 32 of the queries. SDPA is shown in
each way there is to tell it so: enable_gqa, heads repeated in the call, the queries of a group as rows of one head. The
cases `..._heads_first` are the same numbers as [B, H, S, D] in memory, which ONNX Runtime asks for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import onepass

from .harness import Case
from .onnx_attention import group_query_attention
from .peers import sdpa_backends
from .timing import Run

KEYS, HEADS, KV_HEADS, DIM = 4096, 32, 8, 128
PAGE = 16


BANDWIDTH = ">= 80% of the read bandwidth"
ROOFLINE = "within 1.6x of the roofline (62% of bound)"
OF_MM = {torch.bfloat16: ">= 60% of torch.mm's rate in bf16", torch.float32: ">= 75% of torch.mm's rate in fp32"}
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def cases(device: torch.device) -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        half = dtype is torch.bfloat16
        yield _case("decode", device, dtype, goal=BANDWIDTH, quick=half)
        yield _case("decode_b8", device, dtype, batch=8, goal=BANDWIDTH)
        yield _case("paged", device, dtype, page=PAGE, goal=">= 90% of the contiguous case's speed", quick=half)
    yield _int8_case()
    for queries in (2, 4, 8, 16):
        yield _case(f"decode_q{queries}", device, torch.bfloat16, queries=queries, goal=ROOFLINE, quick=queries == 8)
    yield _case("decode_q8", device, torch.float32, queries=8, goal=ROOFLINE)
    for dtype in (torch.float32, torch.bfloat16):
        prefill: dict[str, Any] = {"heads": 8, "kv_heads": 8, "goal": OF_MM[dtype]}
        yield _case("prefill", device, dtype, queries=1024, keys=1024, dim=64, quick=dtype is torch.bfloat16, **prefill)
        yield _case("prefill_hd128", device, dtype, queries=1024, keys=1024, **prefill)
        yield _case("prefill_4k", device, dtype, queries=4096, keys=4096, **prefill)
    if device.type == "cpu":
        for dtype in (torch.float32, torch.float16):
            yield _case("decode_heads_first", device, dtype, heads_first=True)
        yield _case("decode_q8_heads_first", device, torch.float32, queries=8, heads_first=True)
        yield _case(
            "prefill_heads_first", device, torch.float32, queries=1024, keys=1024, heads=8, kv_heads=8, heads_first=True
        )
    yield _call(device)
    for dtype in (torch.float32, torch.bfloat16):
        yield _merge(dtype)


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
    kind: str, device: torch.device, dtype: torch.dtype, batch: int = 1, queries: int = 1, keys: int = KEYS,
    heads: int = HEADS, kv_heads: int = KV_HEADS, dim: int = DIM, page: int = 0, heads_first: bool = False,
    goal: str = "", quick: bool = False,
) -> Case:
    causal = queries > 1

    def make(device: torch.device) -> tuple:
        def numbers(*shape: int) -> Tensor:
            if heads_first:
                return numbers_of(shape[0], shape[2], shape[1], shape[3]).transpose(1, 2)
            return numbers_of(*shape)

        numbers_of = lambda *shape: torch.randn(*shape, device=device).to(dtype)
        cache = (batch * keys // page, page) if page else (batch, keys)
        q = numbers_of(batch, queries, heads, dim)
        k, v = (numbers(*cache, kv_heads, dim) for _ in "kv")
        if page:
            return q, k, v, torch.randperm(batch * keys // page, device=device).int().reshape(batch, -1)
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

    runs: dict[str, Run] = {"onepass": ours, "eager": whole(_textbook), "SDPA": whole(_sdpa_gqa)}
    if heads != kv_heads:
        runs |= {"SDPA, repeated heads": whole(_sdpa_repeated), "SDPA, folded heads": whole(_sdpa_folded)}
    if heads_first:
        runs["ONNX Runtime"] = lambda q, k, v, seen: group_query_attention(q, k, v)
    runs |= sdpa_backends(device, whole(_sdpa_gqa))
    size = dtype.itemsize
    return Case(
        op="kvcache_attention" if page else "attention",
        name=f"{kind}_{NAMES[dtype]}",
        shape=f"B{batch} Q{queries} K{keys} H{heads}/{kv_heads} D{dim}" + (f" page {page}" if page else ""),
        dtype=dtype,
        make=make,
        implementations=runs,
        reference=lambda q, k, v, last: ours(q, k, v, last, backend="reference"),
        reads=batch * (queries * heads + 2 * keys * kv_heads) * dim * size,
        writes=batch * queries * heads * dim * size,
        flops=4 * batch * heads * dim * queries * keys // (2 if queries == keys else 1),
        formula="q, keys and values read once, the result written; 4 D operations a query head and key, causal half",
        goal=goal,
        quick=quick,
    )


def _call(device: torch.device) -> Case:
    """What a call costs before any work: one token over a cache of 16 keys, 4 heads of 64."""

    def make(device: torch.device) -> tuple:
        q, k, v = (torch.randn(1, n, 4, 64, device=device) for n in (1, 16, 16))
        return q, k, v, torch.tensor([16], dtype=torch.int32, device=device)

    def ours(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, backend: str | None = None) -> Any:
        return onepass.attention_with_kvcache(q, k, v, cache_seqlens=lengths, backend=backend)

    return Case(
        op="kvcache_attention",
        name="call_fp32",
        shape="B1 Q1 K16 H4 D64",
        dtype=torch.float32,
        make=make,
        implementations={
            "onepass": ours,
            "eager": lambda q, k, v, lengths: _textbook(q, k, v, None),
            "SDPA": lambda q, k, v, lengths: _sdpa(q, k, v, None),
        },
        reference=functools.partial(ours, backend="reference"),
        reads=33 * 4 * 64 * 4,
        writes=4 * 64 * 4,
        formula="the time is the call's own: host microseconds; SDPA's with the transposes that its layout asks for",
        goal="at most 2x SDPA's",
    )


def _merge(dtype: torch.dtype, parts: int = 8, batch: int = 32) -> Case:
    """The results over eight parts of a cache, joined."""

    def make(device: torch.device) -> tuple:
        outs = torch.randn(parts, batch, 1, HEADS, DIM, device=device).to(dtype)
        return outs, torch.randn(parts, batch, HEADS, 1, device=device)

    def textbook(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
        lse = lses.logsumexp(0)
        weights = (lses - lse).exp().transpose(-1, -2)[..., None]
        return (weights * outs).sum(0).to(outs.dtype), lse

    rows = batch * HEADS
    return Case(
        op="merge_attention",
        name=f"merge_{NAMES[dtype]}",
        shape=f"N{parts} B{batch} H{HEADS} D{DIM}",
        dtype=dtype,
        make=make,
        implementations={"onepass": lambda outs, lses: onepass.merge_attention(outs, lses), "eager": textbook},
        reference=lambda outs, lses: onepass.merge_attention(outs, lses, backend="reference"),
        reads=parts * rows * (DIM * dtype.itemsize + 4),
        writes=rows * (DIM * dtype.itemsize + 4),
        formula="the parts and their LSE read once, the result written",
    )


def _int8_case() -> Case:
    """Decoding as decode_bf16 from an int8 cache with a scale a token and head; the others dequantize it first."""

    def make(device: torch.device) -> tuple:
        q = torch.randn(1, 1, HEADS, DIM, device=device).bfloat16()
        k, v = (torch.randint(-127, 128, (1, KEYS, KV_HEADS, DIM), dtype=torch.int8, device=device) for _ in "kv")
        return q, k, v, *(torch.rand(1, KEYS, KV_HEADS, device=device) / 64 for _ in "kv")

    def ours(q: Tensor, k: Tensor, v: Tensor, k_scale: Tensor, v_scale: Tensor, backend: str | None = None) -> Any:
        return onepass.attention_with_kvcache(
            q, k, v, cache_seqlens=KEYS, k_scale=k_scale.float(), v_scale=v_scale.float(), backend=backend
        )

    def dequantized(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(q: Tensor, k: Tensor, v: Tensor, k_scale: Tensor, v_scale: Tensor) -> Tensor:
            return attend(q, *((x * scale[..., None]).to(q.dtype) for x, scale in ((k, k_scale), (v, v_scale))), None)

        return run

    return Case(
        op="kvcache_attention",
        name="decode_int8",
        shape=f"B1 Q1 K{KEYS} H{HEADS}/{KV_HEADS} D{DIM} int8",
        dtype=torch.bfloat16,
        make=make,
        implementations={
            "onepass": ours, "eager": dequantized(_textbook), "SDPA, folded heads": dequantized(_sdpa_folded),
        },
        reference=lambda q, k, v, *scales: ours(q, k, v, scales[0], scales[1], backend="reference"),
        reads=2 * HEADS * DIM + 2 * KEYS * KV_HEADS * (DIM + 4),
        writes=2 * HEADS * DIM,
        flops=4 * HEADS * DIM * KEYS,
        formula="q, codes and float32 scales read once, the result written; 4 D operations a query head and key",
        goal=">= 1.4x the tokens of decode_bf16",
    )
