"""Attention and its cache on the CPU and on CUDA devices."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _C, DTYPES, kernels, on_device, pointer

_NO_HEADS = (0, 0, 0, 0)
_NO_ROTARY = (0, 0, 0, 0, True)


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _heads(x: Tensor) -> tuple[int, int, int, int]:
    """(pointer, elements to the next batch row, token and head) of [B, S, H, D] or [total, H, D]."""
    return x.data_ptr(), x.stride(0) if x.dim() == 4 else 0, x.stride(-3), x.stride(-2)


def _floats(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float().contiguous()


def _ints(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _rotary(cos: Tensor | None, sin: Tensor | None, interleaved: bool) -> Any:
    if cos is None:
        return _C.Rotary(*_NO_ROTARY)
    return _C.Rotary(pointer(cos), pointer(sin), cos.shape[0], cos.shape[1], interleaved)


def _mask(mask: Tensor | None, shape: tuple[int, ...]) -> tuple[int, Tensor | None, tuple[int, ...]]:
    """(kind, the tensor that holds it, its strides over [B, H, Sq, Sk])."""
    if mask is None:
        return 0, None, _NO_HEADS
    mask = mask if mask.dtype == torch.bool else mask.float()
    return (1 if mask.dtype == torch.bool else 2), mask, mask.expand(shape).stride()


def _describe(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, queries: int, cache: tuple[Any, ...], rotary: Any,
    ordered: bool, causal: bool, window_left: int, window_right: int, softcap: float, scale: float,
    alibi_slopes: Tensor | None, sinks: Tensor | None, mask: Tensor | None, tree: Tensor | None,
) -> tuple[Any, list[Tensor | None]]:
    """The kernel's description of a call, and the tensors that it points into beside the given ones."""
    seqlens, keys, appended, slots, pages, table, batch_idx, leftpad, cu_seqlens = cache
    batch, heads = seqlens.shape[0] if seqlens is not None else q.shape[0], q.shape[-2]
    kind, mask, steps = _mask(mask, (batch, heads, queries, keys))
    slopes, sinks, tree = _floats(alibi_slopes), _floats(sinks), None if tree is None else tree.contiguous()
    call = _C.Attention(
        (batch, heads, k.shape[-2], q.shape[-1], v.shape[-1], queries, q.shape[0]), DTYPES[q.dtype], _heads(q),
        _heads(k), _heads(v), _heads(out), lse.data_ptr(),
        _C.Cache(
            pointer(seqlens), keys, appended, slots, pages, pointer(table), 0 if table is None else table.shape[1],
            pointer(batch_idx), pointer(leftpad), pointer(cu_seqlens),
        ),
        rotary, ordered, window_left, 0 if causal else window_right, softcap, scale, pointer(slopes),
        0 if slopes is None or slopes.dim() == 1 else heads, pointer(sinks), kind, pointer(mask), steps, pointer(tree),
        0 if on_device(q) else torch.get_num_threads(),
    )
    return call, [mask, slopes, sinks, tree]


def _run(
    q: Tensor, k: Tensor, v: Tensor, queries: int, cache: tuple[Any, ...], *options: Any, out: Any
) -> tuple[Tensor, Tensor]:
    heads = q.shape[-2]
    given = out[0] if out is not None else None
    direct = given is not None and given.stride(-1) == 1
    result = given if direct and given is not None else q.new_empty(*q.shape[:-1], v.shape[-1])
    shape = (heads, q.shape[0]) if q.dim() == 3 else (q.shape[0], heads, queries)
    lse = q.new_empty(shape, dtype=torch.float32)
    if lse.numel():
        q = _unit_stride(q)
        call, held = _describe(q, k, v, result, lse, queries, cache, *options)
        native, place = kernels(q)
        workspace = q.new_empty(native.attention_workspace(call), dtype=torch.uint8)
        native.attention_forward(call, workspace.data_ptr(), *((place,) if on_device(q) else ()))
        del held
    return (result if direct or given is None else given.copy_(result)), lse


def _gradient(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    queries: int, cache: tuple[Any, ...], dk: Tensor, dv: Tensor, *options: Any,
) -> tuple[Tensor, Tensor]:
    """dq and dsinks; dk and dv are filled, which have the shapes of k and v, or of what these expand."""
    sinks = options[-3]
    total, lse = q.new_zeros(q.shape, dtype=torch.float32), lse.contiguous()
    top, excess = lse.clone(), torch.ones_like(lse)
    delta = torch.zeros_like(lse) if grad_lse is None else -grad_lse.float().contiguous()
    if lse.numel() and k.numel():
        q, out, grad_out = _unit_stride(q), _unit_stride(out), _unit_stride(grad_out)
        grad_lse = None if grad_lse is None else grad_lse.float().contiguous()
        call, held = _describe(q, k, v, out, lse, queries, cache, *options)
        workspace = q.new_empty(_C.attention_backward_workspace(call), dtype=torch.uint8)
        _C.attention_backward(
            call, _heads(grad_out), pointer(grad_lse), _heads(total), _heads(dk), _heads(dv), top.data_ptr(),
            excess.data_ptr(), delta.data_ptr(), workspace.data_ptr(),
        )
        del held
    if sinks is None:
        return total.to(q.dtype), q.new_empty(0)
    share = torch.where(top == -torch.inf, 0.0, (sinks.float()[:, None] - top).exp() / excess)
    return total.to(q.dtype), -(share * delta).sum((0, 2) if lse.dim() == 3 else 1).to(sinks.dtype)


def forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, window_left: int, window_right: int, softcap: float, scale: float,
    alibi_slopes: Tensor | None, sinks: Tensor | None, mask: Tensor | None, out: Any = None,
) -> tuple[Tensor, Tensor]:
    k, v = _unit_stride(k), _unit_stride(v)
    cache = (None, k.shape[1], 0, k.shape[1], k.shape[0], None, None, None, None)
    return _run(
        q, k, v, q.shape[1], cache, _C.Rotary(*_NO_ROTARY), False, causal, window_left, window_right, softcap, scale,
        alibi_slopes, sinks, mask, None, out=out,
    )


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool,
    window_left: int, window_right: int, softcap: float, scale: float, alibi_slopes: Tensor | None,
    sinks: Tensor | None, mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    k, v = _unit_stride(k), _unit_stride(v)
    cache = (None, k.shape[1], 0, k.shape[1], k.shape[0], None, None, None, None)
    dk, dv = k.new_zeros(k.shape), v.new_zeros(v.shape)
    dq, dsinks = _gradient(
        grad_out, grad_lse, q, k, v, out, lse, q.shape[1], cache, dk, dv, _C.Rotary(*_NO_ROTARY), False, causal,
        window_left, window_right, softcap, scale, alibi_slopes, sinks, mask, None,
    )
    return dq, dk, dv, dsinks


def kvcache_append(
    k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, cache_seqlens: Tensor, block_table: Tensor | None,
    cache_batch_idx: Tensor | None, cache_leftpad: Tensor | None, cu_seqlens: Tensor | None, max_seqlen_q: int,
    rotary_cos: Tensor | None, rotary_sin: Tensor | None, rotary_interleaved: bool, out: None = None,
) -> None:
    if not k.numel():
        return
    k, v, cos, sin = _unit_stride(k), _unit_stride(v), _floats(rotary_cos), _floats(rotary_sin)
    seqlens, table, batch_idx, cu = (_ints(x) for x in (cache_seqlens, block_table, cache_batch_idx, cu_seqlens))
    ragged = cu is not None
    steps = k.shape[0] if ragged else k.shape[1]
    cache = _C.Cache(
        pointer(seqlens), 0, -1 if ragged else steps, k_cache.shape[1], k_cache.shape[0], pointer(table),
        0 if table is None else table.shape[1], pointer(batch_idx), 0, pointer(cu),
    )
    native, place = kernels(k)
    native.kvcache_append(
        (cache_seqlens.shape[0], k.shape[-2], k.shape[-1], v.shape[-1], k.shape[0], steps), DTYPES[k.dtype], _heads(k),
        _heads(v), _heads(k_cache), _heads(v_cache), cache, _rotary(cos, sin, rotary_interleaved),
        place,
    )


def kvcache_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor, appended: int, block_table: Tensor | None,
    cache_batch_idx: Tensor | None, cache_leftpad: Tensor | None, cu_seqlens_q: Tensor | None, max_seqlen_q: int,
    rotary_cos: Tensor | None, rotary_sin: Tensor | None, rotary_interleaved: bool, causal: bool, window_left: int,
    window_right: int, softcap: float, scale: float, alibi_slopes: Tensor | None, sinks: Tensor | None,
    tree_mask: Tensor | None, out: Any = None,
) -> tuple[Tensor, Tensor]:
    cos, sin = _floats(rotary_cos), _floats(rotary_sin)
    seqlens, table, batch_idx, leftpad, cu = (
        _ints(x) for x in (cache_seqlens, block_table, cache_batch_idx, cache_leftpad, cu_seqlens_q)
    )
    cache = (seqlens, 0, appended, k_cache.shape[1], k_cache.shape[0], table, batch_idx, leftpad, cu)
    ordered = causal or window_left >= 0 or window_right >= 0 or tree_mask is not None
    return _run(
        q, k_cache, v_cache, max_seqlen_q, cache, _rotary(cos, sin, rotary_interleaved), ordered, causal, window_left,
        window_right, softcap, scale, alibi_slopes, sinks, None, tree_mask, out=out,
    )
