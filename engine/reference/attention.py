"""Attention in plain PyTorch: the definition that every backend is held to.

Scaled dot-product attention (Vaswani et al. 2017, eq. 1) with logit soft-capping (Gemma 2, 2024), ALiBi (Press et al.
2022), sliding windows (Longformer, 2020), grouped queries (Ainslie et al. 2023) and sinks (Xiao et al. 2024: one
logit per head that takes probability and gives nothing). Merging partial results: Milakov and Gimelshein 2018, eq. 4.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def attention_forward(
    q: Tensor,  # [B, Sq, H, D]
    k: Tensor,  # [B, Sk, Hkv, D], H a multiple of Hkv: query head h reads head h // (H / Hkv)
    v: Tensor,  # [B, Sk, Hkv, Dv]
    causal: bool,
    window_left: int,  # keys before the diagonal that a row sees, -1 for all
    window_right: int,  # keys after it, -1 for all
    softcap: float,  # 0 for none
    scale: float,
    alibi_slopes: Tensor | None = None,  # [H] or [B, H]
    sinks: Tensor | None = None,  # [H]
    mask: Tensor | None = None,  # bool (True attends) or additive, broadcastable to [B, H, Sq, Sk]
) -> tuple[Tensor, Tensor]:  # out [B, Sq, H, Dv], lse [B, H, Sq] (float32 at least)
    """out = softmax(s) v and lse = ln sum exp(s), s by scale, softcap, ALiBi or mask, window and causal, sink.

    Row i sits at key i + Sk - Sq (bottom-right). A row with nothing to attend gives 0 and lse -inf (or its
    sink's logit).
    """
    distance = diagonal(q.shape[1], k.shape[1], q.device)[None]
    allowed = inside(distance, causal, window_left, window_right)
    return attend(q, k, v, distance, allowed, softcap, scale, alibi_slopes, sinks, mask)


def diagonal(sq: int, sk: int, device: torch.device) -> Tensor:
    """How far key j lies before row i of a bottom-right aligned square: i + sk - sq - j.   [sq, sk]"""
    return torch.arange(sk - sq, sk, device=device)[:, None] - torch.arange(sk, device=device)


def inside(distance: Tensor, causal: bool, window_left: int, window_right: int) -> Tensor:
    """Which (row, key) pairs the window and the causal rule let through."""
    allowed = torch.ones_like(distance, dtype=torch.bool)
    if causal:
        allowed = allowed & (distance >= 0)
    if window_left >= 0:
        allowed = allowed & (distance <= window_left)
    if window_right >= 0:
        allowed = allowed & (distance >= -window_right)
    return allowed


def attend(
    q: Tensor,  # [B, Sq, H, D]
    k: Tensor,  # [B, Sk, Hkv, D]
    v: Tensor,  # [B, Sk, Hkv, Dv]
    distance: Tensor,  # [1 or B, Sq, Sk]
    allowed: Tensor,  # [1 or B, Sq, Sk] bool
    softcap: float,
    scale: float,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Attention with an explicit table of distances and of allowed pairs, for rows of different lengths too."""
    scores, _ = _scores(q, k, distance, allowed, softcap, scale, alibi_slopes, mask)
    lse = _logsumexp(scores, sinks)
    probs = _exp_minus(scores, lse[..., None])
    out = torch.einsum("bhij,bjhd->bihd", probs, _per_head(v.to(probs.dtype), q.shape[2]))
    return out.to(q.dtype).contiguous(), lse


def attention_backward(
    grad_out: Tensor,  # [B, Sq, H, Dv]
    grad_lse: Tensor | None,  # [B, H, Sq]
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,  # [B, Sq, H, Dv] as the forward returned it
    lse: Tensor,  # [B, H, Sq]
    causal: bool,
    window_left: int,
    window_right: int,
    softcap: float,
    scale: float,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # dq, dk, dv and dsinks (size 0 without sinks)
    """The gradient of `attention_forward` in closed form."""
    distance = diagonal(q.shape[1], k.shape[1], q.device)[None]
    allowed = inside(distance, causal, window_left, window_right)
    return attend_backward(
        grad_out, grad_lse, q, k, v, out, lse, distance, allowed, softcap, scale, alibi_slopes, sinks, mask
    )


def attend_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    distance: Tensor,  # [1 or B, Sq, Sk]
    allowed: Tensor,  # [1 or B, Sq, Sk] bool
    softcap: float,
    scale: float,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradient of `attend`, the probabilities recomputed from lse (Dao et al. 2022, appendix B.2).

    ds = p (dp - delta) with dp = dout v^T and delta = sum_d dout out - dlse; the cap multiplies by 1 - tanh^2.
    """
    heads, groups = q.shape[2], q.shape[2] // k.shape[2]
    scores, capped = _scores(q, k, distance, allowed, softcap, scale, alibi_slopes, mask)
    wide = scores.dtype
    probs = _exp_minus(scores, lse.to(wide)[..., None])
    grad = grad_out.to(wide)
    delta = torch.einsum("bihd,bihd->bhi", grad, out.to(wide))
    if grad_lse is not None:
        delta = delta - grad_lse.to(wide)
    grad_scores = probs * (torch.einsum("bihd,bjhd->bhij", grad, _per_head(v.to(wide), heads)) - delta[..., None])
    if capped is not None:
        grad_scores = grad_scores * (1 - (capped / softcap) ** 2)
    grad_scores = grad_scores * scale
    dq = torch.einsum("bhij,bjhd->bihd", grad_scores, _per_head(k.to(wide), heads))
    dk = torch.einsum("bhij,bihd->bjhd", grad_scores, q.to(wide)).unflatten(2, (-1, groups)).sum(3)
    dv = torch.einsum("bhij,bihd->bjhd", probs, grad).unflatten(2, (-1, groups)).sum(3)
    dsinks = q.new_empty(0)
    if sinks is not None:
        dsinks = -(_exp_minus(sinks.to(wide)[:, None], lse.to(wide)) * delta).sum((0, 2)).to(sinks.dtype)
    dq, dk, dv = (d.to(x.dtype).contiguous() for d, x in ((dq, q), (dk, k), (dv, v)))
    return dq, dk, dv, dsinks


def merge_attention(
    outs: Tensor,  # [N, ..., S, H, D]
    lses: Tensor,  # [N, ..., H, S] natural log, without sinks
    sinks: Tensor | None = None,  # [H]
) -> tuple[Tensor, Tensor]:  # out [..., S, H, D], lse [..., H, S]
    """Joins attention over N disjoint sets of keys: lse = ln sum_n exp(lse_n), out = sum_n exp(lse_n - lse) out_n.

    A part with lse -inf saw no key: its out is not read.
    """
    wide = torch.promote_types(lses.dtype, torch.float32)
    lses = lses.to(wide)
    lse = _logsumexp(lses.movedim(0, -1), sinks)
    weights = _exp_minus(lses, lse).transpose(-1, -2)[..., None]
    parts = torch.where(weights > 0, outs.to(wide), 0)
    return (weights * parts).sum(0).to(outs.dtype).contiguous(), lse.contiguous()


def merge_attention_backward(
    grad_out: Tensor,  # [..., S, H, D]
    grad_lse: Tensor | None,  # [..., H, S]
    outs: Tensor,  # [N, ..., S, H, D]
    lses: Tensor,  # [N, ..., H, S]
    out: Tensor,  # [..., S, H, D]
    lse: Tensor,  # [..., H, S]
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # douts, dlses, dsinks (size 0 without sinks)
    """With w_n = exp(lse_n - lse): dout_n = w_n dout, dlse_n = w_n (dout . (out_n - out) + dlse)."""
    wide = torch.promote_types(lses.dtype, torch.float32)
    grad, lse = grad_out.to(wide), lse.to(wide)
    weights = _exp_minus(lses.to(wide), lse)
    per_row = weights.transpose(-1, -2)[..., None]
    parts = torch.where(per_row > 0, outs.to(wide), 0)
    shared = -(grad * out.to(wide)).sum(-1).transpose(-1, -2)
    if grad_lse is not None:
        shared = shared + grad_lse.to(wide)
    dlses = weights * ((grad * parts).sum(-1).transpose(-1, -2) + shared)
    dsinks = outs.new_empty(0)
    if sinks is not None:
        taken = _exp_minus(sinks.to(wide)[:, None], lse) * shared
        dsinks = taken.movedim(-2, 0).flatten(1).sum(1).to(sinks.dtype)
    return (per_row * grad).to(outs.dtype).contiguous(), dlses.to(lses.dtype).contiguous(), dsinks


def _scores(
    q: Tensor,
    k: Tensor,
    distance: Tensor,
    allowed: Tensor,
    softcap: float,
    scale: float,
    alibi_slopes: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor | None]:  # [B, H, Sq, Sk] with -inf where nothing is attended; the capped scores before bias
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("bihd,bjhd->bhij", q.to(wide), _per_head(k.to(wide), q.shape[2])) * scale
    capped = None
    if softcap > 0:
        scores = capped = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        slopes = alibi_slopes.to(wide).reshape(-1, q.shape[2], 1, 1)
        scores = scores - slopes * distance.abs()[:, None]
    allowed = allowed[:, None]
    if mask is not None and mask.dtype is torch.bool:
        allowed = allowed & mask
    elif mask is not None:
        scores = scores + mask.to(wide)
    return scores.masked_fill(~allowed, -math.inf), capped


def _logsumexp(scores: Tensor, sinks: Tensor | None) -> Tensor:  # [..., H, S, keys] -> [..., H, S]
    if scores.shape[-1] == 0:
        lse = scores.new_full(scores.shape[:-1], -math.inf)
    else:
        shift = scores.detach().amax(-1)
        empty = shift == -math.inf  # kept apart from the others: -inf - -inf and ln 0 would turn gradients into NaN
        shift = torch.where(empty, 0, shift)
        total = torch.where(empty, 1, (scores - shift[..., None]).exp().sum(-1))
        lse = torch.where(empty, -math.inf, shift + total.log())
    return lse if sinks is None else torch.logaddexp(lse, sinks.to(lse.dtype)[:, None].expand_as(lse))


def _exp_minus(scores: Tensor, lse: Tensor) -> Tensor:  # exp(scores - lse), 0 where lse is -inf
    empty = lse == -math.inf
    return torch.where(empty, 0, (scores - torch.where(empty, 0, lse)).exp())


def _per_head(x: Tensor, heads: int) -> Tensor:  # [B, S, Hkv, D] -> [B, S, H, D]
    return x.repeat_interleave(heads // x.shape[2], 2)
