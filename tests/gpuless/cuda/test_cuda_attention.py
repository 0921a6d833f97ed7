"""Attention in CUDA, over plain keys and over a cache: errors, layouts bit by bit, poison, what only a device sees."""
from __future__ import annotations

import itertools

import pytest
import torch

import onepass
from onepass._native import attention as native

import cases
from helpers import assert_as_good_as_torch
from test_attention import core, in_float64, inputs, options
from test_attention_kvcache import LAYOUTS, OPTIONS, Rows, randn
from test_attention_varlen import Ragged

ONE_ORDER = ["shuffled", pytest.param("cuda", marks=pytest.mark.gpu)]      # of threads: for what takes long
PLAIN = ("none", "causal", "window", "softcap", "alibi", "sinks", "bool", "additive", "many")


def there(kwargs, device):
    return {n: x.to(device) if isinstance(x, torch.Tensor) else x for n, x in kwargs.items()}


def plain_cases():
    """Every option with small cases, two with large ones; the rest is slow."""
    for case, option in itertools.product(cases.ATTENTION, PLAIN):
        b, sq, sk, h, _, d, _ = case
        quick = b * sq * sk * h * d <= 1_000_000 or option in ("causal", "many")
        yield pytest.param(case, option, id=f"{case}-{option}", marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize("device", ONE_ORDER, indirect=True)
@pytest.mark.parametrize(("case", "option"), list(plain_cases()))
def test_as_good_as_torch(case, option, device):
    for dtype in cases.FLOATS:
        q, k, v = inputs(case, dtype)
        chosen = options(option, case)
        out, lse = onepass.attention(
            *(x.to(device) for x in (q, k, v)), return_lse=True, backend="cuda", **there(chosen, device)
        )
        truth = onepass.attention(
            q.double(), k.double(), v.double(), return_lse=True, backend="reference", **in_float64(chosen)
        )
        assert out.dtype == dtype and lse.dtype == torch.float32
        assert_as_good_as_torch(out.cpu(), core(q, k, v, **chosen)[0], truth[0], "out")
        assert_as_good_as_torch(lse.cpu(), core(q.float(), k.float(), v.float(), **chosen)[1], truth[1], "lse")


def cached(rows, device, ragged=False, layout=None, **chosen):
    """As Rows.call, on the device."""
    k_cache, v_cache, kwargs = rows.layout(**(layout or {}))
    q = rows.q
    k, v = (torch.stack([x[len(x) - rows.new :] for x in own]) for own in (rows.k, rows.v))
    if ragged:
        q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
        kwargs |= {"cu_seqlens_q": torch.arange(len(rows.lengths) + 1).int() * rows.new, "max_seqlen_q": rows.new}
    out, lse = onepass.attention_with_kvcache(
        *(x.to(device) for x in (q, k_cache, v_cache, k, v)), return_lse=True, backend="cuda",
        **there(kwargs | chosen, device),
    )
    if ragged:
        out, lse = out.unflatten(0, (-1, rows.new)), lse.unflatten(1, (-1, rows.new)).transpose(0, 1)
    return out, lse


def pairs():
    for layout, option in itertools.product(LAYOUTS, OPTIONS):
        quick = layout in (LAYOUTS[0], LAYOUTS[-1]) or option in ("rotary", "many")
        yield pytest.param(layout, option, id=f"{layout}-{option}", marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize("device", ONE_ORDER, indirect=True)
@pytest.mark.parametrize(("layout", "option"), list(pairs()))
def test_caches_match_the_reference(layout, option, device):
    """Slots that hold no key are NaN."""
    for dtype, tolerance in ((torch.float32, 3e-6), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)):
        rows = Rows((0, 5, 150), dtype=dtype)
        truth = rows.double().call(layout=layout, backend="reference", **OPTIONS[option])
        for ragged in (False, True):
            out, lse = (x.cpu().double() for x in cached(rows, device, ragged, layout, **OPTIONS[option]))
            torch.testing.assert_close(out, truth[0], rtol=0, atol=tolerance * float(truth[0].abs().max()))
            torch.testing.assert_close(lse, truth[1], rtol=0, atol=tolerance * 5)


@pytest.mark.parametrize("device", ONE_ORDER, indirect=True)
@pytest.mark.parametrize("sizes", [(1, 4, 1), (1, 3, 3), (4, 8, 2), (9, 4, 2)], ids=str)
@pytest.mark.parametrize("dtype", cases.FLOATS)
def test_layout_and_batch_do_not_change_a_bit(sizes, dtype, device):
    new, heads, kv_heads = sizes
    rows = Rows((0, 130, 300), new, heads, kv_heads, 16, 24, dtype)
    run = lambda *args, **more: cached(*args, causal=True, **more)
    truth = run(rows, device)
    for layout in LAYOUTS:
        if dtype == torch.float32 or len(layout) < 2:
            assert all(map(torch.equal, run(rows, device, layout=layout), truth)), layout
    assert all(map(torch.equal, run(rows, device, ragged=True), truth))
    for b in range(3):
        out, lse = run(rows.only(b), device)
        assert torch.equal(out[0], truth[0][b]) and torch.equal(lse[0], truth[1][b])


@pytest.mark.parametrize("device", ONE_ORDER, indirect=True)
@pytest.mark.parametrize("option", ["none", "sinks"])
def test_splitting_the_keys_changes_no_bit(option, device):
    """Alone a row's chunks are blocks of their own; in so large a batch one block walks all of them."""
    case = (264, 1, 600, 1, 1, 16, 16)
    q, k, v = (x.to(device) for x in inputs(case))
    chosen = there(options(option, case), device)
    out, lse = onepass.attention(q, k, v, return_lse=True, backend="cuda", **chosen)
    for b in (0, 5, 263):
        one = onepass.attention(*(x[b : b + 1] for x in (q, k, v)), return_lse=True, backend="cuda", **chosen)
        assert torch.equal(one[0][0], out[b]) and torch.equal(one[1][0], lse[b])


@pytest.mark.parametrize("device", ONE_ORDER, indirect=True)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_ragged_rows_on_tensor_cores_and_beside_them(dtype, device):
    """Rows of many queries and of few in one batch, packed and in pages: each has the bits that it has alone."""
    case = Ragged(((70, 90), (1, 300), (33, 40), (80, 20), (0, 4), (3, 7)), heads=2, kv_heads=1, dtype=dtype)
    case.q, case.k, case.v, case.cu_q, case.cu_k = (
        x.to(device) for x in (*case.tensors(), case.cu_q, case.cu_k)
    )
    chosen = there({"causal": True, "window": (60, -1), "sinks": randn(2, seed=5), "softcap": 3.0}, device)
    out, lse = case.call(backend="cuda", **chosen)
    k, v, table = (x.to(device) for x in case.pages(7))
    paged = onepass.attention_varlen(
        case.q, k, v, *case.lengths(), block_table=table, return_lse=True, backend="cuda", **chosen
    )
    assert torch.equal(paged[0], out) and torch.equal(paged[1], lse)
    for b in range(case.batch):
        alone = case.alone(b, return_lse=True, backend="cuda", **chosen)
        at = slice(int(case.cu_q[b]), int(case.cu_q[b + 1]))
        assert torch.equal(alone[0][0], out[at]) and torch.equal(alone[1][0], lse[:, at]), b


def test_appending_writes_these_slots_and_no_other(device):
    rows = Rows(lengths=(2, 9))
    k_cache, v_cache, kwargs = rows.layout(page=4)
    k, v = randn(2, 3, 2, 32, seed=1), randn(2, 3, 2, 32, seed=2)
    on_device = [x.clone().to(device) for x in (k_cache, v_cache)]
    onepass.attention_with_kvcache(rows.q.to(device), *on_device, k.to(device), v.to(device), backend="cuda",
                                   **there(kwargs, device))
    onepass.attention_with_kvcache(rows.q, k_cache, v_cache, k, v, backend="reference", **kwargs)
    for mine, truth in zip(on_device, (k_cache, v_cache), strict=True):
        assert torch.equal(mine.cpu().nan_to_num(7), truth.nan_to_num(7))


def test_what_points_outside_the_cache_is_neither_read_nor_written(device):
    """Values that the host cannot see: the kernels skip what does not exist."""
    k_cache, v_cache = (randn(4, 8, 2, 16, seed=s).to(device) for s in (1, 2))
    before = k_cache.clone()
    q, k, v = (randn(3, 1, 2, 16, seed=s).to(device) for s in (3, 4, 5))
    ints = lambda *x: torch.tensor(x, dtype=torch.int32, device=device)
    table = torch.tensor([[0, 2**30], [-5, 1], [3, 2]], dtype=torch.int32, device=device)
    arguments = (table, None, None, None, 1, None, None, True)
    native.kvcache_append(k_cache, v_cache, k, v, ints(9, 3, 15), *arguments)
    changed = (k_cache != before).flatten(1).any(1)
    assert changed.tolist() == [False, False, True, False] and torch.equal(k_cache[2, 7], k[2, 0])
    out, _ = native.kvcache_attention(q, k_cache, v_cache, ints(9, 7, 2**30), 1, *arguments, False, -1, -1, 0.0, 0.25,
                                      None, None, None)
    assert out.isfinite().all() and not out[1].any()        # the second row's only page does not exist
    own = torch.softmax(torch.einsum("hd,khd->hk", q[0, 0], k_cache[0]) * 0.25, -1)
    torch.testing.assert_close(out[0, 0], torch.einsum("hk,khd->hd", own, v_cache[0]))


def test_gradients_are_the_references(device):
    q, k, v = (x.to(device).requires_grad_() for x in inputs((2, 9, 40, 4, 2, 32, 32)))
    results = []
    for backend in ("cuda", "reference"):
        out = onepass.attention(q, k, v, causal=True, backend=backend)
        results.append(torch.autograd.grad(out.square().sum(), (q, k, v)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("dtype", cases.FLOATS)
def test_every_order_of_threads(dtype, device):
    """What the sanitizers and all three orders run: both stages of the pipeline, ragged tails, several warps."""
    for case, option in (((2, 3, 77, 4, 2, 40, 72), "many"), ((1, 9, 300, 2, 1, 16, 16), "causal"),
                         ((1, 2, 40, 2, 2, 7, 9), "none"), ((1, 35, 90, 2, 1, 40, 24), "many")):
        q, k, v = inputs(case, dtype)
        chosen = options(option, case)
        got = onepass.attention(*(x.to(device) for x in (q, k, v)), backend="cuda", **there(chosen, device)).cpu()
        truth = onepass.attention(q.double(), k.double(), v.double(), backend="reference", **in_float64(chosen))
        assert_as_good_as_torch(got, core(q, k, v, **chosen)[0], truth)
