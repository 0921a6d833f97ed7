"""The attention references against SDPA, a loop over single scores in float64, closed forms, gradcheck."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from onepass.reference import attention as reference
from onepass.reference import kvcache

NONE = (False, -1, -1, 0.0)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def qkv(
    b: int, sq: int, sk: int, h: int, hkv: int, d: int, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, ...]:
    return (
        randn(b, sq, h, d, seed=1, dtype=dtype),
        randn(b, sk, hkv, d, seed=2, dtype=dtype),
        randn(b, sk, hkv, d, seed=3, dtype=dtype),
    )


def naive(q, k, v, causal=False, left=-1, right=-1, softcap=0.0, scale=1.0, slopes=None, sinks=None, mask=None):
    """One score at a time, in Python floats: slow, and nothing to get wrong. Rows are [S, H, D]."""
    (sq, heads, _), (sk, kv_heads, dv) = q.shape, v.shape
    out, lse = torch.zeros(sq, heads, dv, dtype=torch.float64), torch.full((heads, sq), -math.inf, dtype=torch.float64)
    for h in range(heads):
        for i in range(sq):
            at, seen = i + sk - sq, []
            for j in range(sk):
                s = scale * float(q[i, h].double() @ k[j, h * kv_heads // heads].double())
                s = softcap * math.tanh(s / softcap) if softcap else s
                s = s - float(slopes[h]) * abs(at - j) if slopes is not None else s
                if mask is not None and mask.dtype is not torch.bool:
                    s += float(mask[h, i, j])
                hidden = (causal and j > at) or (left >= 0 and j < at - left) or (right >= 0 and j > at + right)
                if not hidden and not (mask is not None and mask.dtype is torch.bool and not mask[h, i, j]):
                    seen.append((s, j))
            logits = [s for s, _ in seen] + ([float(sinks[h])] if sinks is not None else [])
            if logits:
                top = max(logits)
                lse[h, i] = top + math.log(math.fsum(math.exp(s - top) for s in logits))
            for s, j in seen:
                out[i, h] += math.exp(s - lse[h, i]) * v[j, h * kv_heads // heads].double()
    return out, lse


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", [(2, 5, 5, 4, 2, 8), (1, 64, 64, 2, 2, 33), (3, 1, 17, 6, 1, 16)])
def test_forward_is_sdpa(shape, causal, dtype):
    q, k, v = qkv(*shape, dtype=dtype)
    out, lse = reference.attention_forward(q, k, v, causal and shape[1] > 1, -1, -1, 0.0, shape[-1] ** -0.5)
    truth = F.scaled_dot_product_attention(
        *(x.transpose(1, 2).double() for x in (q, k, v)), is_causal=causal and shape[1] > 1, enable_gqa=True
    ).transpose(1, 2)
    torch.testing.assert_close(out.double(), truth, rtol=1e-5, atol=1e-6 if dtype is torch.float32 else 1e-12)
    assert lse.dtype is dtype and lse.shape == (shape[0], shape[3], shape[1])


OPTIONS = [
    {},
    {"causal": True},
    {"left": 3, "right": 1},
    {"left": 2, "right": 4, "causal": True},
    {"left": 0, "right": 0},
    {"softcap": 2.5},
    {"slopes": True, "causal": True},
    {"sinks": True},
    {"sinks": True, "causal": True, "left": 1},
    {"mask": "bool"},
    {"mask": "float", "softcap": 3.0},
    {"slopes": True, "sinks": True, "mask": "bool", "softcap": 1.5, "causal": True, "left": 5},
]


@pytest.mark.parametrize("sizes", [(4, 9), (9, 4), (1, 6), (3, 0), (0, 3), (6, 6)])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_forward_is_the_naive_loop(options, sizes):
    sq, sk, heads = *sizes, 4
    q, k, v = qkv(2, sq, sk, heads, 2, 5)
    slopes = randn(2, heads, seed=4).abs() if options.get("slopes") else None
    sinks = randn(heads, seed=5) if options.get("sinks") else None
    mask = None
    if "mask" in options:
        mask = randn(2, heads, sq, sk, seed=6)
        mask = mask > 0 if options["mask"] == "bool" else mask
    causal, left, right, cap = (
        options.get(n, d) for n, d in (("causal", False), ("left", -1), ("right", -1), ("softcap", 0.0))
    )
    out, lse = reference.attention_forward(q, k, v, causal, left, right, cap, 0.7, slopes, sinks, mask)
    for b in range(2):
        row = (q[b], k[b], v[b], causal, left, right, cap, 0.7, None if slopes is None else slopes[b], sinks)
        truth = naive(*row, None if mask is None else mask[b])
        torch.testing.assert_close((out[b], lse[b]), truth, rtol=1e-12, atol=1e-12)


def test_nothing_to_attend_gives_zero():
    q, k, v = qkv(1, 5, 2, 2, 1, 4)  # bottom-right: rows 0 to 2 lie before the first key
    out, lse = reference.attention_forward(q, k, v, True, -1, -1, 0.0, 1.0)
    assert torch.equal(out[:, :3], torch.zeros(1, 3, 2, 4, dtype=out.dtype))
    assert torch.isneginf(lse[..., :3]).all() and torch.isfinite(lse[..., 3:]).all()
    sinks = torch.tensor([0.5, -2.0], dtype=torch.float64)
    out, lse = reference.attention_forward(q, k, v, True, -1, -1, 0.0, 1.0, None, sinks)
    assert torch.equal(lse[0, :, 0], sinks) and not out[:, :3].any()


@pytest.mark.parametrize("option", ["plain", "softcap", "alibi", "sinks", "mask", "bool", "all"])
@pytest.mark.parametrize("sizes", [(3, 5), (5, 3)])
def test_gradients(option, sizes):
    q, k, v = (x.requires_grad_() for x in qkv(1, *sizes, 4, 2, 3))
    full = option == "all"
    sinks = randn(4, seed=5).requires_grad_() if full or option == "sinks" else None
    slopes = randn(4, seed=6).abs() if full or option == "alibi" else None
    mask = randn(1, 4, *sizes, seed=7) if option in ("mask", "bool", "all") else None
    mask = mask > 0 if option == "bool" else mask
    args = (True, 3, -1, 1.5 if full or option == "softcap" else 0.0, 0.6, slopes)
    leaves = [x for x in (q, k, v, sinks) if x is not None]

    def forward(*inputs):
        out, lse = reference.attention_forward(*inputs[:3], *args, inputs[3] if len(inputs) > 3 else None, mask)
        return out, torch.where(torch.isneginf(lse), 0, lse)

    assert torch.autograd.gradcheck(forward, leaves)
    out, lse = reference.attention_forward(q, k, v, *args, sinks, mask)
    grad_out, grad_lse = randn(*out.shape, seed=8), torch.where(torch.isneginf(lse), 0, randn(*lse.shape, seed=9))
    finite = torch.where(torch.isneginf(lse), 0, lse)
    truth = torch.autograd.grad((out * grad_out).sum() + (finite * grad_lse).sum(), leaves)
    got = reference.attention_backward(grad_out, grad_lse, q, k, v, out, lse, *args, sinks, mask)
    torch.testing.assert_close([x.detach() for x in got[: len(leaves)]], list(truth), rtol=1e-10, atol=1e-10)
    assert sinks is not None or got[3].numel() == 0


@pytest.mark.parametrize("sinks", [False, True])
def test_merge_is_attention_over_all_keys(sinks):
    q, k, v = qkv(2, 4, 12, 4, 2, 5)
    sink = randn(4, seed=5) if sinks else None
    parts = [reference.attention_forward(q, k[:, a:b], v[:, a:b], *NONE, 0.5) for a, b in ((0, 3), (3, 3), (3, 12))]
    outs, lses = torch.stack([o for o, _ in parts]), torch.stack([x for _, x in parts])
    outs[1] = math.nan  # saw no key: not read
    merged = reference.merge_attention(outs, lses, sink)
    torch.testing.assert_close(merged, reference.attention_forward(q, k, v, *NONE, 0.5, None, sink))
    assert merged[1].shape == (2, 4, 4)


def test_merge_gradients():
    outs, lses, sinks = (
        x.requires_grad_() for x in (randn(3, 2, 4, 2, 3), randn(3, 2, 2, 4, seed=1), randn(2, seed=2))
    )
    assert torch.autograd.gradcheck(reference.merge_attention, (outs, lses, sinks))
    out, lse = reference.merge_attention(outs, lses, sinks)
    grad_out, grad_lse = randn(*out.shape, seed=3), randn(*lse.shape, seed=4)
    truth = torch.autograd.grad((out * grad_out).sum() + (lse * grad_lse).sum(), (outs, lses, sinks))
    torch.testing.assert_close(
        reference.merge_attention_backward(grad_out, grad_lse, outs, lses, out, lse, sinks), truth
    )


class Rows:
    """A cache of three rows of different lengths, told once as plain rows of keys and built as contiguous or paged."""

    lengths, new, heads, kv_heads, dim, capacity = (0, 5, 12), 3, 4, 2, 8, 20

    def __init__(self, page: int = 0, leftpad: bool = False, shuffled: bool = False, poison: float = math.nan):
        self.leftpad = torch.tensor([0, 2, 7], dtype=torch.int32) if leftpad else None
        self.k, self.v = (
            [randn(n + self.new, 2, self.dim, seed=s + i) for i, n in enumerate(self.lengths)] for s in (10, 20)
        )
        self.seqlens = torch.tensor(self.lengths, dtype=torch.int32)
        self.table = self.batch_idx = None
        slots = self.capacity // page if page else 1
        if page:
            pages = torch.randperm(3 * slots + 2, generator=torch.Generator().manual_seed(1)).int()
            self.table = pages[: 3 * slots].reshape(3, slots).clone()
            used = [-(-(n + self.new) // page) for n in self.lengths]
            for b, n in enumerate(used):
                self.table[b, n:] = 2**30  # never looked at
            shape = (3 * slots + 2, page)
        else:
            shape = (5 if shuffled else 3, self.capacity)
            self.batch_idx = torch.tensor([4, 0, 2], dtype=torch.int32) if shuffled else None
        self.k_cache, self.v_cache = (torch.full((*shape, 2, self.dim), poison, dtype=torch.float64) for _ in "kv")
        for b, n in enumerate(self.lengths):
            for j in range(self.first(b), n):
                for cache, rows in ((self.k_cache, self.k), (self.v_cache, self.v)):
                    cache[self.slot(b, j)] = rows[b][j]

    def first(self, b: int) -> int:
        return 0 if self.leftpad is None else min(int(self.leftpad[b]), self.lengths[b] + self.new)

    def slot(self, b: int, j: int) -> tuple[int, int]:
        if self.table is not None:
            size = self.k_cache.shape[1]
            return int(self.table[b, j // size]), j % size
        return (b if self.batch_idx is None else int(self.batch_idx[b])), j

    def appended(self, which: str) -> torch.Tensor:
        return torch.stack([rows[-self.new :] for rows in getattr(self, which)])


LAYOUTS = [
    {},
    {"page": 1},
    {"page": 4},
    {"page": 5},
    {"leftpad": True},
    {"shuffled": True},
    {"shuffled": True, "leftpad": True},
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"causal": True}, {"left": 4, "causal": True}, {"slopes": True, "sinks": True, "softcap": 2.0}],
    ids=str,
)
def test_cache_is_the_naive_loop(layout, options):
    rows = Rows(**layout)
    kvcache.kvcache_append(
        rows.k_cache, rows.v_cache, rows.appended("k"), rows.appended("v"), rows.seqlens, rows.table, rows.batch_idx
    )
    q = randn(3, rows.new, rows.heads, rows.dim, seed=30)
    slopes = randn(rows.heads, seed=31).abs() if options.get("slopes") else None
    sinks = randn(rows.heads, seed=32) if options.get("sinks") else None
    window = (options.get("causal", False), options.get("left", -1), -1, options.get("softcap", 0.0), 0.4)
    cache = (rows.k_cache, rows.v_cache, rows.seqlens, rows.new, rows.table, rows.batch_idx, rows.leftpad)
    tail = (None, None, True, *window, slopes, sinks)
    out, lse = kvcache.kvcache_attention(q, *cache, None, rows.new, *tail)
    counts = torch.tensor([0, 3, 1, 2])  # ragged: the same rows with one to three of their last queries
    ragged = torch.cat([q[b, rows.new - n :] for b, n in enumerate(counts[1:].tolist())])
    out_ragged, lse_ragged = kvcache.kvcache_attention(ragged, *cache, counts.cumsum(0).int(), rows.new, *tail)
    for b in range(3):
        lo = rows.first(b)
        truth = naive(q[b], rows.k[b][lo:], rows.v[b][lo:], *window, slopes, sinks)
        torch.testing.assert_close((out[b], lse[b]), truth, rtol=1e-12, atol=1e-12)
        n, at = int(counts[b + 1]), int(counts[: b + 1].sum())
        torch.testing.assert_close(out_ragged[at : at + n], truth[0][rows.new - n :], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(lse_ragged[:, at : at + n], truth[1][:, rows.new - n :], rtol=1e-12, atol=1e-12)
        for j in range(rows.lengths[b] if rows.lengths[b] > lo else lo, rows.lengths[b] + rows.new):
            assert torch.equal(rows.v_cache[rows.slot(b, j)], rows.v[b][j])


def test_tree_mask_is_a_boolean_mask_over_the_last_keys():
    rows = Rows()
    kvcache.kvcache_append(rows.k_cache, rows.v_cache, rows.appended("k"), rows.appended("v"), rows.seqlens)
    q, tree = randn(3, rows.new, rows.heads, rows.dim, seed=30), randn(3, 3, 3, seed=33) > 0
    args = (None, None, None, None, 3, None, None, True, *NONE, 0.4, None, None, tree)
    out, lse = kvcache.kvcache_attention(q, rows.k_cache, rows.v_cache, rows.seqlens, rows.new, *args)
    for b, n in enumerate(rows.lengths):
        mask = torch.cat([torch.ones(3, n, dtype=torch.bool), tree[b]], 1).expand(rows.heads, -1, -1)
        torch.testing.assert_close((out[b], lse[b]), naive(q[b], rows.k[b], rows.v[b], *NONE, 0.4, mask=mask))


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("half", [1, 3, 4])
def test_rotation_is_a_complex_product(interleaved, half):
    x, angles = randn(2, 5, 3, 8), randn(20, half, seed=1)
    position = torch.tensor([[0, 1, 2, 3, 19], [4, 4, 4, 0, 1]])
    got = kvcache.rotate(x, position, angles.cos(), angles.sin(), interleaved)
    pair = x[..., : 2 * half].unflatten(-1, (half, 2) if interleaved else (2, half))
    pair = pair if interleaved else pair.transpose(-1, -2)
    turned = (
        torch.view_as_complex(pair.contiguous()) * torch.polar(torch.ones_like(angles), angles)[position][..., None, :]
    )
    turned = torch.view_as_real(turned)
    truth = (turned if interleaved else turned.transpose(-1, -2)).flatten(-2)
    torch.testing.assert_close(got, torch.cat([truth, x[..., 2 * half :]], -1))


@pytest.mark.parametrize("causal", [True, False])
def test_rotated_scores_depend_on_distance_alone(causal):
    """Decoding a shifted row: with rotary embedding only differences of positions count, so the outputs agree."""
    dim, angles = 8, torch.arange(40, dtype=torch.float64)[:, None] * torch.tensor([1.0, 0.3, 0.1], dtype=torch.float64)
    q, k, v = randn(1, 3, 2, dim, seed=1), randn(1, 7, 2, dim, seed=2), randn(1, 7, 2, dim, seed=3)
    results = []
    for shift in (0, 6):
        caches = [torch.full((1, 20, 2, dim), math.nan, dtype=torch.float64) for _ in "kv"]
        start, rotary = torch.tensor([shift], dtype=torch.int32), (angles.cos(), angles.sin(), False)
        kvcache.kvcache_append(*caches, k[:, :4], v[:, :4], start, None, None, None, None, 3, *rotary)
        kvcache.kvcache_append(*caches, k[:, 4:], v[:, 4:], start + 4, None, None, None, None, 3, *rotary)
        args = (3, None, None, start, None, 3, *rotary, causal, -1, -1, 0.0, 0.5)
        results.append(kvcache.kvcache_attention(q, *caches, start + 4, *args))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)


def test_out_of_range_tokens_are_skipped_where_values_may_not_be_read():
    cache = torch.zeros(2, 4, 1, 2, dtype=torch.float64)
    k = randn(3, 2, 1, 2)
    kvcache.kvcache_append(cache, cache.clone(), k, k, torch.tensor([3, -1, 0]), None, torch.tensor([0, 1, 9]))
    truth = torch.zeros_like(cache)
    truth[0, 3], truth[1, 0] = k[0, 0], k[1, 1]
    assert torch.equal(cache, truth)
