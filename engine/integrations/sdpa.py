"""torch.nn.functional.scaled_dot_product_attention with its own signature, through `onepass.attention`."""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import attention


def scaled_dot_product_attention(
    query: Tensor,                          # [..., H, L, E]
    key: Tensor,                            # [..., H, S, E], or [..., Hkv, S, E] with enable_gqa
    value: Tensor,                          # as key, with Ev
    attn_mask: Tensor | None = None,        # bool (True attends) or additive, broadcastable to [..., H, L, S]
    dropout_p: float = 0.0,                 # above 0 is refused
    is_causal: bool = False,                # query i sees keys 0 to i: top-left aligned, unlike `onepass.attention`
    *,
    scale: float | None = None,             # of query . key; None: E ** -0.5
    enable_gqa: bool = False,
) -> Tensor:                                # [..., H, L, Ev]
    """softmax(query key^T scale) value. A query with every key masked gives 0. Gradients flow to all but the mask."""
    if dropout_p > 0:
        raise ValueError(f"dropout_p={dropout_p}: onepass has no attention dropout, expected 0.0")
    if is_causal and attn_mask is not None:
        raise ValueError("attn_mask and is_causal are both given: expected one of them")
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} is {type(x).__name__}, expected a tensor")
        if x.dim() < 2:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, expected [..., H, L, E] with 2 dims or more")
    lead: Sequence[int] | None = None           # dims before the heads, where they are not one batch that all share
    q, k, v = query, key, value
    rank = max(q.dim(), k.dim(), v.dim())
    if not q.dim() == k.dim() == v.dim() == 4 or not q.shape[0] == k.shape[0] == v.shape[0]:
        q, k, v = (x[(None,) * (4 - x.dim())] if x.dim() < 4 else x for x in (q, k, v))
        lead = torch.broadcast_shapes(q.shape[:-3], k.shape[:-3], v.shape[:-3])
        q, k, v = (x.expand(*lead, *x.shape[-3:]).flatten(0, -4) for x in (q, k, v))
        if attn_mask is not None and len(lead) > 1 and attn_mask.dim() > 3:
            attn_mask = attn_mask.expand(*lead, *attn_mask.shape[-3:]).flatten(0, -4)
    heads, kv_heads = q.shape[1], k.shape[1]
    if heads != kv_heads and not enable_gqa:
        if 1 not in (heads, kv_heads):
            raise ValueError(f"key has {kv_heads} heads and query {heads}: expected the same, or enable_gqa=True")
        q = q.expand(-1, max(heads, kv_heads), -1, -1)
    window = (-1, -1)
    if is_causal:       # keys after the last query are not seen; further queries than keys shift the diagonal
        length, keys = q.shape[2], k.shape[2]
        k, v, window = k[:, :, :length], v[:, :, :length], (-1, max(length - keys, 0))
    out = attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask=attn_mask, scale=scale, window=window
    )
    assert isinstance(out, Tensor)
    out = out.transpose(1, 2)
    if lead is None:
        return out
    out = out.unflatten(0, lead)
    return out[(0,) * (4 - rank)] if rank < 4 else out


__all__ = ["scaled_dot_product_attention"]
