"""Along a ray, a chunk of samples at a time: where they lie, what they absorb, what reaches them."""
from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._math import exp, expm1

LARGEST: tl.constexpr = tl.constexpr(torch.finfo(torch.float32).max)


@triton.jit
def multiply(head, tail, other_head, other_tail):
    """(head + tail) (other_head + other_tail): the tail holds what rounding the head lost."""
    product = head * other_head
    lost = tl.fma(head, other_head, product * -1.0)
    return product, tl.fma(head, other_tail, tl.fma(tail, other_head, lost))


@triton.jit
def affine(value, scale, nearer_value, nearer_scale):
    return tl.fma(nearer_scale, value, nearer_value), scale * nearer_scale


@triton.jit
def shift_up(x, edge, lane):
    """Lanes one up, the first filled from `edge`."""
    return tl.where(lane == 0, edge, tl.gather(x, tl.maximum(lane - 1, 0), 0))


@triton.jit
def shift_down(x, edge, lane, B: tl.constexpr):
    """Lanes one down, the last filled from `edge`."""
    return tl.where(lane == B - 1, edge, tl.gather(x, tl.minimum(lane + 1, B - 1), 0))


@triton.jit
def lane_at(x, lane, place):
    return tl.sum(tl.where(lane == place, x, 0.0), 0)


@triton.jit
def ray_at(
    Offsets, ray, total, n_samples, sigma_step, alpha_step, feature_step, start_step, end_step, N: tl.constexpr
):
    """(first, count) of a ray's samples, and where they begin in sigmas, alphas, features, starts and ends; offsets
    that leave the samples are cut off."""
    if Offsets is None:
        return (
            ray * n_samples, n_samples.to(tl.int64), ray * sigma_step, ray * alpha_step, ray * feature_step,
            ray * start_step, ray * end_step
        )
    else:
        first = tl.minimum(tl.maximum(tl.load(Offsets + ray), 0), total)
        end = tl.minimum(tl.maximum(tl.load(Offsets + ray + 1), first), total)
        return first, end - first, first, first, first * N, first, first


@triton.jit
def sample_at(Sigmas, Alphas, Starts, Ends, sigmas_at, alphas_at, starts_at, ends_at, at, inside):
    """(alpha, 1 - alpha, sigma, middle, length) of a chunk; lanes beyond the ray absorb nothing."""
    start = tl.load(Starts + starts_at + at, mask=inside, other=0.0).to(tl.float32)
    end = tl.load(Ends + ends_at + at, mask=inside, other=0.0).to(tl.float32)
    if Sigmas is None:
        alpha = tl.load(Alphas + alphas_at + at, mask=inside, other=0.0).to(tl.float32)
        keep, sigma = 1.0 - alpha, alpha * 0
    else:
        sigma = tl.load(Sigmas + sigmas_at + at, mask=inside, other=0.0).to(tl.float32)
        sigma = tl.where(sigma > LARGEST, LARGEST, sigma)       # infinite and of no length absorbs nothing; NaN stays
        tau = sigma * (start - end)
        alpha, keep = expm1(tau) * -1.0, exp(tau)
    return alpha, keep, sigma, 0.5 * (start + end), end - start


@triton.jit
def march(alpha, keep, mid, head, tail, eps, lane, inside, B: tl.constexpr):
    """(transmittance before, after, alpha, weight, middle, lit, first dead lane) of a chunk, and head and tail of
    what goes on: what a sample that is not composited held reads as 0."""
    heads, tails = tl.associative_scan((keep, keep * 0), 0, multiply)
    heads, tails = multiply(head, tail, heads, tails)
    after = heads + tails
    before = shift_up(after, head + tail, lane)
    dead = inside & ~(before >= eps)
    stop = tl.min(tl.where(dead, lane, B), 0)
    lit = inside & (lane < stop)
    alpha, mid = tl.where(lit, alpha, 0.0), tl.where(lit, mid, 0.0)
    weight = tl.where(lit, before * alpha, 0.0)
    end = lane_at(after, lane, B - 1)
    rest = lane_at(tails - (after - heads), lane, B - 1)
    stopped = lane_at(before, lane, stop)
    return (
        before, after, alpha, weight, mid, lit, stop, tl.where(stop < B, stopped, end), tl.where(stop < B, 0.0, rest)
    )


@triton.jit
def spread_of(weight, mid, front, reach, edge, lane, B: tl.constexpr):
    """(weight in front, sum_{j<i} w_j (m_i - m_j)) of a chunk, and the three carries behind it."""
    through = tl.cumsum(weight, 0)
    before = front + shift_up(through, 0.0, lane)
    far = reach + tl.cumsum(before * (mid - shift_up(mid, edge, lane)), 0)
    return before, far, front + lane_at(through, lane, B - 1), lane_at(far, lane, B - 1), lane_at(mid, lane, B - 1)


@triton.jit
def clear(Out, at, inside):
    if Out is not None:
        tl.store(Out + at, (at * 0).to(Out.dtype.element_ty), mask=inside)


@triton.jit
def put(Out, at, value, inside):
    if Out is not None:
        tl.store(Out + at, value.to(Out.dtype.element_ty), mask=inside)
