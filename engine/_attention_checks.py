"""What attention and its cache accept: shapes, dtypes and, in host memory, values."""
from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from . import _checks as check

MAX_HEAD_DIM = 256
CODES = (torch.int8, torch.float8_e4m3fn)       # what a quantized cache holds


def is_rank(name: str, x: Any, layout: str) -> None:
    check.is_float_tensor(name, x)
    if x.dim() != len(layout.split(",")):
        raise ValueError(f"{name} has shape {tuple(x.shape)}, expected [{layout}]")


def is_cache(name: str, x: Any, layout: str) -> None:
    """A tensor of values or of codes."""
    if isinstance(x, Tensor) and x.dtype in CODES:
        if x.dim() != len(layout.split(",")):
            raise ValueError(f"{name} has shape {tuple(x.shape)}, expected [{layout}]")
    else:
        is_rank(name, x, layout)


def is_size(name: str, x: Tensor, dim: int, size: int, meaning: str) -> None:
    if x.shape[dim] != size:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, expected {size} in dim {dim} ({meaning})")


def same_kind(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.dtype != other.dtype:
        raise TypeError(f"{name} has dtype {x.dtype}, expected that of {other_name}, {other.dtype}")
    if x.device != other.device:
        raise ValueError(f"{name} is on {x.device}, expected the device of {other_name}, {other.device}")


def same_device(name: str, x: Tensor, q: Tensor) -> None:
    if x.device != q.device:
        raise ValueError(f"{name} is on {x.device}, expected the device of q, {q.device}")


def scales(name: str, x: Tensor | None, cache: Tensor, batch: int, q: Tensor) -> None:
    """The scales of a cache: of codes only, and of int8 always."""
    per_head, per_token = (batch, cache.shape[2]), tuple(cache.shape[:3])
    expected = f"float32 [B, Hkv] = {per_head}, or {per_token}: a scale for each token and head of the cache"
    if cache.dtype not in CODES:
        if x is not None:
            raise ValueError(f"{name} is given with a cache of {cache.dtype}, expected one of int8 or float8_e4m3fn")
    elif x is None:
        if cache.dtype == torch.int8:
            raise ValueError(f"{name} is None with a cache of int8, expected {expected}")
    elif not isinstance(x, Tensor):
        raise TypeError(f"{name} is {type(x).__name__}, expected {expected}")
    elif x.dtype != torch.float32:
        raise TypeError(f"{name} has dtype {x.dtype}, expected {expected}")
    elif tuple(x.shape) not in (per_head, per_token):
        raise ValueError(f"{name} has shape {tuple(x.shape)}, expected {expected}")
    else:
        same_device(name, x, q)


def heads(q: Tensor, k: Tensor, v: Tensor, names: tuple[str, str]) -> None:
    """Head dims and head counts: the last two dims of q, k and v."""
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"{names[0]} has head dim {k.shape[-1]}, expected that of q, {q.shape[-1]}")
    for name, x in (("q", q), (names[1], v)):
        if not 1 <= x.shape[-1] <= MAX_HEAD_DIM:
            raise ValueError(f"{name} has head dim {x.shape[-1]}, expected 1 to {MAX_HEAD_DIM}")
    if k.shape[-2] != v.shape[-2]:
        raise ValueError(f"{names[1]} has {v.shape[-2]} heads, expected those of {names[0]}, {k.shape[-2]}")
    if k.shape[-2] == 0 or q.shape[-2] == 0 or q.shape[-2] % k.shape[-2]:
        raise ValueError(f"q has {q.shape[-2]} heads, expected a positive multiple of {names[0]}'s {k.shape[-2]}")


def options(window: Any, softcap: float, scale: float | None, head_dim: int) -> tuple[int, int, float, float]:
    """(window_left, window_right, softcap, scale) as the core ops take them."""
    if not isinstance(window, (tuple, list)) or len(window) != 2 or any(isinstance(w, (bool, float)) for w in window):
        raise TypeError(f"window={window!r}: expected two ints (left, right), -1 for no bound")
    if any(isinstance(w, int) and w < -1 for w in window):
        raise ValueError(f"window={tuple(window)}: expected -1 (no bound) or more")
    if not softcap >= 0:
        raise ValueError(f"softcap={softcap}: expected 0 (none) or more")
    return window[0], window[1], float(softcap), float(head_dim**-0.5 if scale is None else scale)


def per_head(q: Tensor, n_heads: int, batch: int, alibi_slopes: Tensor | None, sinks: Tensor | None) -> None:
    allowed = (("alibi_slopes", alibi_slopes, ((n_heads,), (batch, n_heads))), ("sinks", sinks, ((n_heads,),)))
    for name, x, shapes in allowed:
        if x is None:
            continue
        check.is_float_tensor(name, x)
        if tuple(x.shape) not in shapes:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, expected {' or '.join(map(str, shapes))}")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device}, expected the device of q, {q.device}")
    without_gradient("alibi_slopes", alibi_slopes)


def without_gradient(name: str, x: Tensor | None) -> None:
    if x is not None and x.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} requires a gradient, which attention does not give: pass {name}.detach()")


def is_mask(x: Tensor | None, q: Tensor, shape: tuple[int, int, int, int]) -> None:
    """At most four dims, each 1 or that of [B, H, Sq, Sk]."""
    if x is None:
        return
    if not isinstance(x, Tensor):
        raise TypeError(f"mask is {type(x).__name__}, expected a bool or floating tensor")
    if x.dtype != torch.bool:
        check.is_float_tensor("mask", x)
    if x.device != q.device:
        raise ValueError(f"mask is on {x.device}, expected the device of q, {q.device}")
    without_gradient("mask", x)
    full = (1,) * (4 - x.dim()) + tuple(x.shape)
    if x.dim() > 4 or any(n not in (1, wanted) for n, wanted in zip(full, shape, strict=True)):
        raise ValueError(f"mask has shape {tuple(x.shape)}, expected one that broadcasts to [B, H, Sq, Sk] = {shape}")


def is_index(name: str, x: Tensor | None, shape: tuple[int | None, ...], q: Tensor, meaning: str) -> None:
    """An int32 tensor on q's device; None in `shape` is any size."""
    if x is None:
        return
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is {type(x).__name__}, expected an int32 tensor {meaning}")
    if x.dtype != torch.int32:
        raise TypeError(f"{name} has dtype {x.dtype}, expected int32")
    if x.dim() != len(shape) or any(want is not None and n != want for n, want in zip(x.shape, shape, strict=True)):
        raise ValueError(f"{name} has shape {tuple(x.shape)}, expected {meaning}")
    if x.device != q.device:
        raise ValueError(f"{name} is on {x.device}, expected the device of q, {q.device}")


def rotary(cos: Tensor | None, sin: Tensor | None, q: Tensor, k: Tensor | None) -> None:
    if (cos is None) != (sin is None):
        raise ValueError("rotary_cos and rotary_sin: expected both or neither")
    if cos is None or sin is None:
        return
    if k is None:
        raise ValueError("rotary_cos is given without k and v: queries rotate with the keys that are appended")
    is_rank("rotary_cos", cos, "positions, rotary_dim / 2")
    check.is_like("rotary_sin", sin, "rotary_cos", cos)
    if cos.device != q.device:
        raise ValueError(f"rotary_cos is on {cos.device}, expected the device of q, {q.device}")
    if not 1 <= cos.shape[1] <= q.shape[-1] // 2 or cos.shape[0] < 1:
        limit = q.shape[-1] // 2
        raise ValueError(f"rotary_cos has shape {tuple(cos.shape)}, expected [1 or more, 1 to head dim / 2 = {limit}]")


def cache_values(
    cache: Tensor,                          # [Bc, capacity, ...] or [pages, page_size, ...] with block_table
    cache_seqlens: Tensor,                  # [B]
    appended: int,                          # -1: as many as the row has queries
    block_table: Tensor | None,
    cache_batch_idx: Tensor | None,
    cache_leftpad: Tensor | None,
    cu_seqlens_q: Tensor | None,
    max_seqlen_q: int,
    tokens: int,                            # rows of q when ragged
    positions: int | None,                  # of the rotary table
) -> None:
    """Raises ValueError where a value points outside the cache; on a device only with ONEPASS_CHECK=1."""
    if not check.checkable(cache_seqlens, block_table, cache_batch_idx, cache_leftpad, cu_seqlens_q):
        return
    lengths = cache_seqlens.tolist()
    counts = [max_seqlen_q] * len(lengths)
    if cu_seqlens_q is not None:
        counts = rising("cu_seqlens_q", cu_seqlens_q, tokens, "rows of q")
        if max(counts, default=0) > max_seqlen_q:
            raise ValueError(f"max_seqlen_q={max_seqlen_q}: cu_seqlens_q has a row of {max(counts)} queries")
    new = counts if appended < 0 else [appended] * len(lengths)
    totals = [a + b for a, b in zip(lengths, new, strict=True)]
    capacity = cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    for b, (length, total) in enumerate(zip(lengths, totals, strict=True)):
        if length < 0 or total > capacity:
            raise ValueError(
                f"cache_seqlens[{b}]={length} with {total - length} new keys: expected 0 to the capacity, {capacity}"
            )
    if positions is not None:
        turned = [max(pair) for pair in zip(new, counts, strict=True)]      # keys or queries, from the length on
        last = max((a + n if n else 0 for a, n in zip(lengths, turned, strict=True)), default=0)
        if last > positions:
            raise ValueError(f"rotary_cos has {positions} positions, this call reaches position {last - 1}")
    if cache_leftpad is not None:
        for b, pad in enumerate(cache_leftpad.tolist()):
            if not 0 <= pad <= totals[b]:
                raise ValueError(f"cache_leftpad[{b}]={pad}: expected 0 to the row's length, {totals[b]}")
    if cache_batch_idx is not None:
        indices = cache_batch_idx.tolist()
        if any(not 0 <= i < cache.shape[0] for i in indices):
            raise ValueError(f"cache_batch_idx is {indices}, expected 0 to {cache.shape[0] - 1}")
        if any(new) and len(set(indices)) != len(indices):
            raise ValueError(f"cache_batch_idx is {indices}: two rows would append to one cache row")
    if block_table is not None:
        pages_exist(cache, totals, block_table)


def pages_exist(cache: Tensor, lengths: list[int], block_table: Tensor) -> None:
    """Raises ValueError where a page that holds some of a row's `lengths` keys is none of the cache's."""
    if not block_table.numel():
        return
    block_table = block_table.cpu()
    low, high = torch.aminmax(block_table)
    if int(low) >= 0 and int(high) < cache.shape[0]:
        return
    size = cache.shape[1]
    blocks = torch.tensor([-(-n // size) if size else 0 for n in lengths])
    used = blocks[:, None] > torch.arange(block_table.shape[1])
    bad = used & ((block_table < 0) | (block_table >= cache.shape[0]))
    if bad.any():
        b, i = bad.nonzero()[0].tolist()
        page = int(block_table[b, i])
        raise ValueError(f"block_table[{b}, {i}]={page}: expected a page from 0 to {cache.shape[0] - 1}")


def rising(name: str, x: Tensor, last: int | None, what: str) -> list[int]:
    """The lengths between neighbours of a cu_seqlens in host memory, which rises from 0 to `last`."""
    cu = x.tolist()
    counts = [b - a for a, b in itertools.pairwise(cu)]
    if cu[0] != 0 or min(counts, default=0) < 0 or (last is not None and cu[-1] != last):
        raise ValueError(f"{name} is {cu}, expected to rise from 0 to the {cu[-1] if last is None else last} {what}")
    return counts


def varlen_values(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    block_table: Tensor | None, *rest: Any,
) -> None:
    """Raises ValueError where a row reaches outside q, k or its pages; on a device only with ONEPASS_CHECK=1."""
    if not check.checkable(cu_seqlens_q, cu_seqlens_k, block_table):
        return
    paged = block_table is not None
    queries = rising("cu_seqlens_q", cu_seqlens_q, q.shape[0], "rows of q")
    keys = rising("cu_seqlens_k", cu_seqlens_k, None if paged else k.shape[0], "keys" if paged else "rows of k")
    for name, counts, longest in (("q", queries, max_seqlen_q), ("k", keys, max_seqlen_k)):
        if max(counts, default=0) > longest:
            raise ValueError(f"max_seqlen_{name}={longest}: cu_seqlens_{name} has a row of {max(counts)}")
    if block_table is None:
        return
    capacity = k.shape[1] * block_table.shape[1]
    for b, count in enumerate(keys):
        if count > capacity:
            raise ValueError(f"cu_seqlens_k gives row {b} {count} keys, its pages in block_table hold {capacity}")
    pages_exist(k, keys, block_table)


def append_values(
    k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, cache_seqlens: Tensor, block_table: Tensor | None,
    cache_batch_idx: Tensor | None, cache_leftpad: Tensor | None, cu_seqlens: Tensor | None, max_seqlen_q: int,
    rotary_cos: Tensor | None, *rest: Any,
) -> None:
    """`cache_values` of the arguments of kvcache_append: also what only the attention after it reads."""
    cache_values(
        k_cache, cache_seqlens, k.shape[1] if cu_seqlens is None else -1, block_table, cache_batch_idx, cache_leftpad,
        cu_seqlens, max_seqlen_q, k.shape[0], None if rotary_cos is None else rotary_cos.shape[0],
    )


def attention_values(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor, appended: int, block_table: Tensor | None,
    cache_batch_idx: Tensor | None, cache_leftpad: Tensor | None, cu_seqlens_q: Tensor | None, max_seqlen_q: int,
    rotary_cos: Tensor | None, *rest: Any,
) -> None:
    """`cache_values` of the arguments of kvcache_attention."""
    cache_values(
        k_cache, cache_seqlens, appended, block_table, cache_batch_idx, cache_leftpad, cu_seqlens_q, max_seqlen_q,
        q.shape[0], None if rotary_cos is None else rotary_cos.shape[0],
    )
