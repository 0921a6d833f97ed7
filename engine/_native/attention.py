"""Attention and its cache on the CPU and on CUDA devices."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _C, CODES, kernels, on_device

# seqlens, appended, block_table, batch_idx, leftpad, cu_seqlens
_Cache = tuple[Tensor | None, int, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
_NO_CACHE: _Cache = (None, 0, None, None, None, None)
_NO_CODES = (0, None, None)                         # kind, k_scale, v_scale
_NO_ROTARY = (None, None, True, False)              # cos, sin, interleaved, whether query i turns by its own position


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.is_contiguous() or x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _bytes(cache: Tensor) -> Tensor:
    """DLPack has float8 in its newer versions alone."""
    return cache.view(torch.uint8) if cache.dtype == torch.float8_e4m3fn else cache


def _floats(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float().contiguous()


def _whole(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _describe(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, queries: int, cache: _Cache,
    rotary: tuple[Any, Any, Any, Any], causal: bool, window_left: int, window_right: int, softcap: float, scale: float,
    alibi_slopes: Tensor | None, sinks: Tensor | None, mask: Tensor | None, tree: Tensor | None,
    codes: tuple[Any, Any, Any] = _NO_CODES,
) -> tuple[Any, tuple[Tensor | None, ...]]:
    """The kernel's description of a call, and the tensors that it points into beside the given ones."""
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.float()
    held = (_floats(alibi_slopes), _floats(sinks), mask, _whole(tree))
    call = _C.Attention(
        q, k, v, out, lse, queries, *cache, *rotary, causal, window_left, window_right, softcap, scale, *held,
        *codes, 0 if on_device(q) else torch.get_num_threads(),
    )
    return call, held


def _run(
    q: Tensor, k: Tensor, v: Tensor, queries: int, cache: tuple[Any, ...], *options: Any, out: Any
) -> tuple[Tensor, Tensor]:
    given = out[0] if out is not None else None
    direct = given is not None and given.stride(-1) == 1
    *rows, heads, dim = q.shape
    if direct and given is not None:
        result = given
    elif dim == v.shape[-1] and q.is_contiguous():
        result = torch.empty_like(q)
    else:
        result = q.new_empty(*rows, heads, v.shape[-1])
    if len(rows) == 2:
        lse = torch.empty(rows[0], heads, queries, dtype=torch.float32, device=q.device)
    else:
        lse = torch.empty(heads, *rows, dtype=torch.float32, device=q.device)
    if lse.numel():
        q = _unit_stride(q)
        call, held = _describe(q, k, v, result, lse, queries, cache, *options)
        if on_device(q):
            native, place = kernels(q)
            native.attention_forward(call, q, place)
        else:
            _C.attention_forward(call, q)
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
        call, held = _describe(q, k, v, out, lse, queries, cache, *options)
        _C.attention_backward(call, grad_out, _floats(grad_lse), total, dk, dv, top, excess, delta)
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
    return _run(
        q, k, v, q.shape[1], _NO_CACHE, _NO_ROTARY, causal, window_left, window_right, softcap, scale, alibi_slopes,
        sinks, mask, None, out=out,
    )


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool,
    window_left: int, window_right: int, softcap: float, scale: float, alibi_slopes: Tensor | None,
    sinks: Tensor | None, mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    k, v = _unit_stride(k), _unit_stride(v)
    dk, dv = k.new_zeros(k.shape), v.new_zeros(v.shape)
    dq, dsinks = _gradient(
        grad_out, grad_lse, q, k, v, out, lse, q.shape[1], _NO_CACHE, dk, dv, _NO_ROTARY, causal, window_left,
        window_right, softcap, scale, alibi_slopes, sinks, mask, None,
    )
    return dq, dk, dv, dsinks


def kvcache_append(
    k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, cache_seqlens: Tensor, block_table: Tensor | None,
    cache_batch_idx: Tensor | None, cache_leftpad: Tensor | None, cu_seqlens: Tensor | None, max_seqlen_q: int,
    rotary_cos: Tensor | None, rotary_sin: Tensor | None, rotary_interleaved: bool, k_head_scale: Tensor | None = None,
    v_head_scale: Tensor | None = None, k_token_scale: Tensor | None = None, v_token_scale: Tensor | None = None,
    out: None = None,
) -> None:
    if not k.numel():
        return
    native, place = kernels(k)
    native.kvcache_append(
        _unit_stride(k), _unit_stride(v), _bytes(k_cache), _bytes(v_cache), cache_seqlens.contiguous(),
        _whole(block_table), _whole(cache_batch_idx), _whole(cu_seqlens), _floats(rotary_cos), _floats(rotary_sin),
        rotary_interleaved, CODES.get(k_cache.dtype, 0), k_head_scale if k_token_scale is None else k_token_scale,
        v_head_scale if v_token_scale is None else v_token_scale, place,
    )


def kvcache_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor, appended: int, block_table: Tensor | None,
    cache_batch_idx: Tensor | None, cache_leftpad: Tensor | None, cu_seqlens_q: Tensor | None, max_seqlen_q: int,
    rotary_cos: Tensor | None, rotary_sin: Tensor | None, rotary_interleaved: bool, causal: bool, window_left: int,
    window_right: int, softcap: float, scale: float, alibi_slopes: Tensor | None, sinks: Tensor | None,
    tree_mask: Tensor | None, k_scale: Tensor | None = None, v_scale: Tensor | None = None, out: Any = None,
) -> tuple[Tensor, Tensor]:
    cache = (
        cache_seqlens.contiguous(), appended, _whole(block_table), _whole(cache_batch_idx), _whole(cache_leftpad),
        _whole(cu_seqlens_q),
    )
    ordered = causal or window_left >= 0 or window_right >= 0 or tree_mask is not None
    rotary = (_floats(rotary_cos), _floats(rotary_sin), rotary_interleaved, ordered)
    return _run(
        q, _bytes(k_cache), _bytes(v_cache), max_seqlen_q, cache, rotary, causal, window_left, window_right, softcap,
        scale, alibi_slopes, sinks, None, tree_mask, (CODES.get(k_cache.dtype, 0), k_scale, v_scale), out=out,
    )
