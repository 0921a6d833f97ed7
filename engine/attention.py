"""Attention: over plain tensors, over a key-value cache, and the merging of partial results."""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _attention_checks as expect
from . import _checks as check
from ._native import cache_fits
from ._ops import call, keep, recall, route, signature


def attention(
    q: Tensor,                              # [B, Sq, H, D], D from 1 to 256
    k: Tensor,                              # [B, Sk, Hkv, D], H a multiple of Hkv
    v: Tensor,                              # [B, Sk, Hkv, Dv]
    *,
    causal: bool = False,                   # row i sees keys up to i + Sk - Sq (bottom-right)
    window: tuple[int, int] = (-1, -1),     # keys seen (before, after) the row's own place; -1: all
    softcap: float = 0.0,                   # scores become softcap * tanh(score / softcap); 0: off
    scale: float | None = None,             # of q . k; None: D ** -0.5
    alibi_slopes: Tensor | None = None,     # [H] or [B, H]: scores lose slope * |distance|
    sinks: Tensor | None = None,            # [H]: a logit that takes probability and gives nothing
    mask: Tensor | None = None,             # bool (True attends) or additive, broadcastable to [B, H, Sq, Sk]
    return_lse: bool = False,
    out: Tensor | None = None,              # [B, Sq, H, Dv]; not together with a gradient
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:        # [B, Sq, H, Dv], with return_lse also [B, H, Sq] float32
    """softmax(q k^T scale) v, query head h reading key head h // (H / Hkv) (Vaswani et al. 2017, eq. 1).

    Scores are taken in the order scale, softcap, ALiBi or additive mask, boolean mask, window and causal, sink. LSE is
    the natural logarithm of the sum of exponentials, the sink included. A row with nothing to attend gives 0 and an LSE
    of -inf (its sink's logit, if it has one). Gradients flow to q, k, v and sinks. Under autocast q, k and v are cast.
    Raises ValueError or TypeError where shapes, dtypes, devices or options do not fit.
    """
    key = signature("attention", q, k, v, causal, window, softcap, scale, alibi_slopes, sinks, mask, out, backend)
    if (known := recall(key)) is None:
        q, k, v, options = _checked(q, k, v, window, softcap, scale, alibi_slopes, sinks, mask, out)
    else:
        run, options = known
    if mask is not None:
        mask = mask[(None,) * (4 - mask.dim())]
    args = (q, k, v, causal, *options, alibi_slopes, sinks, mask)
    if known is None:
        run = route("attention_forward", args, backend)
        keep(key, (run, options))
    result, lse = run(*args) if out is None else run(*args, out=(out, None))
    return (result, lse) if return_lse else result


def _checked(
    q: Tensor, k: Tensor, v: Tensor, window: tuple[int, int], softcap: float, scale: float | None,
    alibi_slopes: Tensor | None, sinks: Tensor | None, mask: Tensor | None, out: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, tuple[int, int, float, float]]:
    """q, k and v as they are to be read, and (window_left, window_right, softcap, scale)."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        expect.is_rank(name, x, "B, S, H, D")
    q, k, v = autocast(q, k, v)
    for name, x in (("k", k), ("v", v)):
        expect.same_kind(name, x, "q", q)
        expect.is_size(name, x, 0, q.shape[0], "the batch of q")
    expect.is_size("v", v, 1, k.shape[1], "the keys of k")
    expect.heads(q, k, v, ("k", "v"))
    batch, sq, n_heads, head_dim = q.shape
    options = expect.options(window, softcap, scale, head_dim)
    expect.per_head(q, n_heads, batch, alibi_slopes, sinks)
    expect.is_mask(mask, q, (batch, n_heads, sq, k.shape[1]))
    check.is_out(out, (batch, sq, n_heads, v.shape[3]), q.dtype, q.device)
    return q, k, v, options


def attention_with_kvcache(
    q: Tensor,                              # [B, Sq, H, D], or [total, H, D] with cu_seqlens_q
    k_cache: Tensor,                        # [Bc, capacity, Hkv, D], or [pages, page_size, Hkv, D] with block_table;
                                            # the dtype of q, or quantized: int8 or float8_e4m3fn
    v_cache: Tensor,                        # as k_cache, with head dim Dv
    k: Tensor | None = None,                # [B, Sn, Hkv, D] or [total, Hkv, D]: appended in place before attending
    v: Tensor | None = None,                # as k, with head dim Dv
    *,
    cache_seqlens: int | Tensor,            # int or int32 [B]: keys in the cache before the append
    block_table: Tensor | None = None,      # int32 [B, blocks]: the pages of each row, of any size
    cache_batch_idx: Tensor | None = None,  # int32 [B]: the cache row of each batch row
    cache_leftpad: Tensor | None = None,    # int32 [B]: slots before a row's first key
    cu_seqlens_q: Tensor | None = None,     # int32 [B + 1]: where each row's queries start, for ragged batches
    max_seqlen_q: int | None = None,        # the longest of those rows; required with cu_seqlens_q
    rotary_cos: Tensor | None = None,       # [positions, rotary_dim / 2]: rotates q and the appended k
    rotary_sin: Tensor | None = None,
    rotary_interleaved: bool = True,        # pairs (2i, 2i + 1), else (i, i + rotary_dim / 2)
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    scale: float | None = None,
    alibi_slopes: Tensor | None = None,     # [H] or [B, H]
    sinks: Tensor | None = None,            # [H]
    tree_mask: Tensor | None = None,        # bool [B, Sq, Sq]: which of the last Sq keys a query sees
    k_scale: Tensor | None = None,          # float32, of a quantized cache: per head [B, Hkv], only read; or per token,
    v_scale: Tensor | None = None,          # as the cache without its last dim, written by the append
    return_lse: bool = False,
    out: Tensor | None = None,
    workspace: Tensor | None = None,        # scratch to reuse; kernels on the CPU take theirs from torch's allocator
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:        # as q with head dim Dv, with return_lse also [B, H, Sq] or [H, total]
    """Appends k and v to the cache in place, then attends from each row's queries to its valid keys.

    A row's queries are its last tokens: with causal, query i sees keys up to its own. The position of a key for the
    rotary embedding is its index in the cache, leftpad not subtracted; queries rotate at cache_seqlens + i with causal,
    a window or a tree mask, else all at cache_seqlens. Slots and pages without a valid key are never read. Options and
    LSE are those of `attention`. Inference only.

    A quantized cache holds codes: a value is code * scale, as with flash-attn 3's k_descale and v_descale, and is never
    rounded to q's dtype. Scales of keys and of values may differ in kind; float8 without one has scale 1, int8 needs
    it. The append writes round(x / scale), ties to even, saturating at -127 to 127 or -448 to 448, x in float32 after
    the rotation. Per token the scale is amax / 127 or amax / 448 of the token's head, so that of zeros is 0; a NaN or
    Inf there makes it NaN or Inf, and rows that see the token NaN. With a scale per head Inf saturates, NaN is float8's
    NaN and int8's 0.
    Raises ValueError or TypeError before anything is written; values on a GPU are not read: what is out of range there
    is skipped.
    """
    key = signature(
        "kvcache", q, k_cache, v_cache, k, v, "int" if type(cache_seqlens) is int else cache_seqlens, block_table,
        cache_batch_idx, cache_leftpad, cu_seqlens_q, max_seqlen_q, rotary_cos, rotary_sin, rotary_interleaved, causal,
        window, softcap, scale, alibi_slopes, sinks, tree_mask, k_scale, v_scale, k_scale is v_scale, out, workspace,
        backend,
    )
    if (known := recall(key)) is None:
        q, k, v, (batch, longest, appended), options = _checked_kvcache(
            q, k_cache, v_cache, k, v, cache_seqlens, block_table, cache_batch_idx, cache_leftpad, cu_seqlens_q,
            max_seqlen_q, rotary_cos, rotary_sin, window, softcap, scale, alibi_slopes, sinks, tree_mask, k_scale,
            v_scale, out, workspace,
        )
    else:
        append, attend, (batch, longest, appended), options = known
    seqlens = _seqlens(cache_seqlens, batch, q)
    places = (block_table, cache_batch_idx, cache_leftpad, cu_seqlens_q, longest)
    positions = None if rotary_cos is None else rotary_cos.shape[0]
    if known is None or not cache_fits(k_cache, seqlens, appended, *places, q.shape[0], positions):
        expect.cache_values(k_cache, seqlens, appended, *places, q.shape[0], positions)

    rotary = (rotary_cos, rotary_sin, rotary_interleaved)
    new = (k_cache, v_cache, k, v, seqlens, *places, *rotary, *_by_kind(k_scale, v_scale))
    args = (
        q, k_cache, v_cache, seqlens, appended, *places, *rotary, causal, *options, alibi_slopes, sinks, tree_mask,
        k_scale, v_scale,
    )
    if known is None:
        append = None if k is None else route("kvcache_append", new, backend)
        attend = route("kvcache_attention", args, backend)
        keep(key, (append, attend, (batch, longest, appended), options))
    if append is not None:
        append(*new)
    result, lse = attend(*args) if out is None else attend(*args, out=(out, None))
    return (result, lse) if return_lse else result


def _checked_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None, v: Tensor | None, cache_seqlens: int | Tensor,
    block_table: Tensor | None, cache_batch_idx: Tensor | None, cache_leftpad: Tensor | None,
    cu_seqlens_q: Tensor | None, max_seqlen_q: int | None, rotary_cos: Tensor | None, rotary_sin: Tensor | None,
    window: tuple[int, int], softcap: float, scale: float | None, alibi_slopes: Tensor | None, sinks: Tensor | None,
    tree_mask: Tensor | None, k_scale: Tensor | None, v_scale: Tensor | None, out: Tensor | None,
    workspace: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None, tuple[int, int, int], tuple[int, int, float, float]]:
    """q, k and v as they are to be read, (rows, the longest's queries, keys that each gets) and the options of scores.

    All that is asked of a call but the values of its tensors and of an int cache_seqlens.
    """
    ragged = cu_seqlens_q is not None
    expect.is_rank("q", q, "total, H, D" if ragged else "B, Sq, H, D")
    for name, x in (("k_cache", k_cache), ("v_cache", v_cache)):
        expect.is_cache(name, x, "pages, page_size, Hkv, D" if block_table is not None else "B, capacity, Hkv, D")
    quantized = k_cache.dtype in expect.CODES
    q, k, v = autocast(q, k, v, to=None if quantized else k_cache.dtype)
    expect.same_kind("v_cache", v_cache, "k_cache", k_cache)
    if quantized:
        expect.same_device("k_cache", k_cache, q)
    else:
        expect.same_kind("k_cache", k_cache, "q", q)
    for name, x in (("k_cache", k_cache), ("v_cache", v_cache)):
        expect.is_size(name, x, 0, k_cache.shape[0], "the first dim of k_cache")
        expect.is_size(name, x, 1, k_cache.shape[1], "the slots of k_cache")
    expect.heads(q, k_cache, v_cache, ("k_cache", "v_cache"))
    batch = _batch(q, k_cache, cache_seqlens, block_table, cache_batch_idx, cu_seqlens_q)
    if ragged == (max_seqlen_q is None):
        raise ValueError(f"max_seqlen_q={max_seqlen_q}: expected an int with cu_seqlens_q, else None")
    longest = q.shape[1] if max_seqlen_q is None else max_seqlen_q
    appended = _appended(q, k_cache, v_cache, k, v, ragged)
    options = expect.options(window, softcap, scale, q.shape[-1])
    expect.per_head(q, q.shape[-2], batch, alibi_slopes, sinks)
    expect.scales("k_scale", k_scale, k_cache, batch, q)
    expect.scales("v_scale", v_scale, v_cache, batch, q)
    if k is not None and k_scale is not None and k_scale is v_scale and k_scale.dim() == 3:
        raise ValueError("v_scale is k_scale: the append writes both, expected two tensors")
    expect.rotary(rotary_cos, rotary_sin, q, k)
    expect.is_index("cu_seqlens_q", cu_seqlens_q, (batch + 1,), q, f"[B + 1] = [{batch + 1}]")
    expect.is_index("block_table", block_table, (batch, None), q, f"[B, blocks] with B = {batch}")
    expect.is_index("cache_batch_idx", cache_batch_idx, (batch,), q, f"[B] = [{batch}]")
    expect.is_index("cache_leftpad", cache_leftpad, (batch,), q, f"[B] = [{batch}]")
    if block_table is not None and cache_batch_idx is not None:
        raise ValueError("block_table and cache_batch_idx are both given: the table names each row's pages")
    if tree_mask is not None and (tree_mask.dtype != torch.bool or tuple(tree_mask.shape) != (batch, longest, longest)):
        raise ValueError(
            f"tree_mask is {tree_mask.dtype} {tuple(tree_mask.shape)}, expected bool {(batch, longest, longest)}"
        )
    differentiable = {
        "q": q, "k_cache": k_cache, "v_cache": v_cache, "k": k, "v": v, "sinks": sinks, "k_scale": k_scale,
        "v_scale": v_scale,
    }
    for name, tensor in differentiable.items():
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} requires a gradient: the cache is for inference, call it under torch.no_grad()")
    if workspace is not None and workspace.device != q.device:
        raise ValueError(f"workspace is on {workspace.device}, expected the device of q, {q.device}")
    check.is_out(out, (*q.shape[:-1], v_cache.shape[-1]), q.dtype, q.device)
    return q, k, v, (batch, longest, appended), options


def merge_attention(
    outs: Tensor | Sequence[Tensor],        # [N, ..., S, H, D], or N tensors [..., S, H, D]
    lses: Tensor | Sequence[Tensor],        # [N, ..., H, S], or N tensors [..., H, S]: natural log, without sinks
    *,
    sinks: Tensor | None = None,            # [H]: enter once, here
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:                 # out [..., S, H, D], lse [..., H, S]
    """Joins attention over N disjoint sets of keys into attention over all of them: split caches, shared prefixes.

    lse = ln sum_n exp(lse_n), out = sum_n exp(lse_n - lse) out_n (Milakov and Gimelshein 2018). A part whose LSE is
    -inf saw no key and its out is not read. Gradients flow to every input.
    """
    outs = outs if isinstance(outs, Tensor) else torch.stack(list(outs))
    lses = lses if isinstance(lses, Tensor) else torch.stack(list(lses))
    check.is_float_tensor("outs", outs)
    check.is_float_tensor("lses", lses)
    expected = (*outs.shape[:-3], *reversed(outs.shape[-3:-1]))
    if outs.dim() < 4 or tuple(lses.shape) != expected:
        raise ValueError(f"lses has shape {tuple(lses.shape)}, expected {expected}: [N, ..., H, S] of outs")
    if lses.device != outs.device:
        raise ValueError(f"lses is on {lses.device}, expected the device of outs, {outs.device}")
    if outs.shape[0] == 0:
        raise ValueError("outs has no parts: expected at least one")
    if sinks is not None:
        check.is_float_tensor("sinks", sinks)
        if tuple(sinks.shape) != (outs.shape[-2],):
            raise ValueError(f"sinks has shape {tuple(sinks.shape)}, expected ({outs.shape[-2]},)")
    out, lse = call("merge_attention", outs, lses, sinks, backend=backend)
    return out, lse


def autocast(*tensors: Tensor | None, to: torch.dtype | None = None) -> list:
    """The tensors in autocast's dtype (or `to`, the cache's) where autocast is on."""
    device = next(x.device.type for x in tensors if x is not None)
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device) if to is None else to
    return [x if x is None or x.dtype == torch.float64 else x.to(dtype) for x in tensors]


def _batch(
    q: Tensor, k_cache: Tensor, cache_seqlens: int | Tensor, block_table: Tensor | None, cache_batch_idx: Tensor | None,
    cu_seqlens_q: Tensor | None,
) -> int:
    if cu_seqlens_q is None:
        batch = q.shape[0]
    elif not isinstance(cu_seqlens_q, Tensor) or cu_seqlens_q.dim() != 1 or cu_seqlens_q.shape[0] < 1:
        raise ValueError("cu_seqlens_q: expected an int32 tensor [B + 1]")
    else:
        batch = cu_seqlens_q.shape[0] - 1
    if block_table is None and cache_batch_idx is None:
        expect.is_size("k_cache", k_cache, 0, batch, "the batch of q")
    if isinstance(cache_seqlens, Tensor):
        expect.is_index("cache_seqlens", cache_seqlens, (batch,), q, f"an int or [B] = [{batch}]")
    elif isinstance(cache_seqlens, bool) or not isinstance(cache_seqlens, (int, torch.SymInt)):
        raise TypeError(f"cache_seqlens is {type(cache_seqlens).__name__}, expected an int or an int32 tensor [B]")
    return batch


def _appended(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None, v: Tensor | None, ragged: bool
) -> int:
    """How many keys every row gets; -1: as many as it has queries."""
    if (k is None) != (v is None):
        raise ValueError("k and v: expected both or neither")
    if k is None or v is None:
        return 0
    for name, x, cache in (("k", k, k_cache), ("v", v, v_cache)):
        expect.is_rank(name, x, "total, Hkv, D" if ragged else "B, Sn, Hkv, D")
        expect.same_kind(name, x, "q", q)
        expect.is_size(name, x, 0, q.shape[0], "as q")
        expect.is_size(name, x, x.dim() - 2, cache.shape[2], "the heads of the cache")
        expect.is_size(name, x, x.dim() - 1, cache.shape[3], "the head dim of the cache")
    if not ragged:
        expect.is_size("v", v, 1, k.shape[1], "the tokens of k")
    return -1 if ragged else k.shape[1]


def _by_kind(k_scale: Tensor | None, v_scale: Tensor | None) -> tuple[Tensor | None, ...]:
    """Of keys and values per head, then per token."""
    if k_scale is None and v_scale is None:
        return None, None, None, None
    return tuple(x if x is not None and x.dim() == rank else None for rank in (2, 3) for x in (k_scale, v_scale))


def _seqlens(cache_seqlens: int | Tensor, batch: int, q: Tensor) -> Tensor:
    if isinstance(cache_seqlens, Tensor):
        return cache_seqlens
    return torch.full((batch,), cache_seqlens, dtype=torch.int32, device=q.device)


__all__ = ["attention", "attention_with_kvcache", "merge_attention"]
