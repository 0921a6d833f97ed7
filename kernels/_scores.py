"""What attention and its gradient do to a tile of products q k^T: cap, biases, masks, in the reference's order."""
import triton
import triton.language as tl

from ._math import expm1


@triton.jit
def capped(s, softcap):
    """softcap tanh(s / softcap)"""
    e = expm1(tl.minimum(tl.abs(s) * (2.0 / softcap), 60.0))
    bent = softcap * (e / (e + 2.0))
    return tl.where(s < 0, bent * -1.0, tl.where(s == s, bent, s))


@triton.jit
def biased(
    s, Slopes, Mask, Tree, b, head, query, at, allowed, behind, queries, slope_row, mask_row, mask_head, mask_query,
    mask_key, window_left, window_right, CAUSAL: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
):
    """Scores [queries, keys] with their biases, -inf where a query does not see a key."""
    distance = (behind + query)[:, None] - at[None, :]
    if Slopes is not None:
        slope = tl.load(Slopes + b * slope_row + head)
        s -= slope[:, None] * tl.abs(distance).to(tl.float32)
    if CAUSAL:
        allowed = allowed & (distance >= 0)
    if LEFT:
        allowed = allowed & (distance <= window_left)
    if RIGHT:
        allowed = allowed & (distance >= 0 - window_right)
    if Mask is not None:
        from_mask = b.to(tl.int64) * mask_row + head.to(tl.int64) * mask_head + query.to(tl.int64) * mask_query
        given = tl.load(Mask + from_mask[:, None] + at[None, :] * mask_key, mask=allowed, other=0)
        if Mask.dtype.element_ty == tl.uint8:
            allowed = allowed & (given != 0)
        else:
            s += given.to(tl.float32)
    if Tree is not None:
        column = at - behind
        from_tree = (b.to(tl.int64) * queries + query) * queries
        asks = allowed & (column >= 0)[None, :]
        seen = tl.load(Tree + from_tree[:, None] + column[None, :], mask=asks, other=1)
        allowed = allowed & (seen != 0)
    return tl.where(allowed, s, float("-inf"))
