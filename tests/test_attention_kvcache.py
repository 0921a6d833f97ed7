"""Attention over a cache: kernels against the reference, layouts bit by bit, poison, tracing, errors."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import onepass
from onepass._native import attention as native

from cases import FLOATS
from helpers import ISAS, assert_as_good_as_torch, run_python

ROTARY = tuple(f(torch.arange(2048)[:, None] * torch.tensor([1.0, 0.2, 0.05])) for f in (torch.cos, torch.sin))


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), device="cpu")
    return x.to(torch.get_default_device(), dtype)


class Rows:
    """Keys and queries of some rows, told once; `call` lays them out as a cache filled with NaN and attends."""

    def __init__(self, lengths=(0, 5, 333), new=3, heads=4, kv_heads=2, dim=32, value_dim=32, dtype=torch.float32):
        self.lengths, self.new, self.dtype = lengths, new, dtype
        self.k = [randn(n + new, kv_heads, dim, seed=10 + b, dtype=dtype) for b, n in enumerate(lengths)]
        self.v = [randn(n + new, kv_heads, value_dim, seed=20 + b, dtype=dtype) for b, n in enumerate(lengths)]
        self.q = randn(len(lengths), new, heads, dim, seed=30, dtype=dtype)
        self.heads = heads

    def double(self) -> Rows:
        wide = Rows.__new__(Rows)
        wide.__dict__.update(self.__dict__, dtype=torch.float64, q=self.q.double())
        wide.k, wide.v = [x.double() for x in self.k], [x.double() for x in self.v]
        return wide

    def only(self, b: int) -> Rows:
        one = Rows.__new__(Rows)
        one.__dict__.update(self.__dict__, lengths=self.lengths[b : b + 1], q=self.q[b : b + 1])
        one.k, one.v = self.k[b : b + 1], self.v[b : b + 1]
        return one

    def layout(self, page=0, leftpad=False, shuffled=False, heads_first=False):
        """(k_cache, v_cache, keyword arguments) with the old keys in place and NaN in every other slot."""
        batch, pads = len(self.lengths), [3 + 2 * b if leftpad else 0 for b in range(len(self.lengths))]
        capacity = max(n + p for n, p in zip(self.lengths, pads, strict=True)) + self.new + 7
        kwargs = {
            "cache_seqlens": torch.tensor([n + p for n, p in zip(self.lengths, pads, strict=True)], dtype=torch.int32)
        }
        if leftpad:
            kwargs["cache_leftpad"] = torch.tensor(pads, dtype=torch.int32)
        blocks = -(-capacity // page) if page else 1
        shuffle = {"generator": torch.Generator().manual_seed(1), "device": "cpu"}
        table = torch.randperm(batch * blocks + 3, **shuffle)[: batch * blocks].reshape(batch, blocks).int()
        table = table.to(torch.get_default_device())
        index = torch.arange(batch).flip(0).int() + 2 if shuffled else torch.arange(batch).int()
        if page:
            kwargs["block_table"] = table.clone()
            for b, total in enumerate(kwargs["cache_seqlens"] + self.new):
                kwargs["block_table"][b, -(-int(total) // page) :] = 2**30
        if shuffled:
            kwargs["cache_batch_idx"] = index
        caches = []
        for rows in (self.k, self.v):
            shape = (batch * blocks + 3, page) if page else (batch + 2, capacity) if shuffled else (batch, capacity)
            sizes = (*shape, *rows[0].shape[1:])
            cache = torch.full(sizes, torch.nan, dtype=self.dtype)
            if heads_first:
                cache = cache.transpose(1, 2).contiguous().transpose(1, 2)
            for b, n in enumerate(self.lengths):
                slot = torch.arange(n) + pads[b]
                at = (table[b, slot // page].long(), slot % page) if page else (int(index[b]), slot)
                cache[at] = rows[b][:n]
            caches.append(cache)
        return *caches, kwargs

    def call(self, ragged=False, append=True, layout=None, **options):
        k_cache, v_cache, kwargs = self.layout(**(layout or {}))
        q = self.q
        k, v = (torch.stack([x[len(x) - self.new :] for x in rows]) for rows in (self.k, self.v))
        if ragged:
            q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
            kwargs |= {"cu_seqlens_q": torch.arange(len(self.lengths) + 1).int() * self.new, "max_seqlen_q": self.new}
        out, lse = onepass.attention_with_kvcache(q, k_cache, v_cache, k, v, return_lse=True, **kwargs, **options)
        if ragged:
            out, lse = out.unflatten(0, (-1, self.new)), lse.unflatten(1, (-1, self.new)).transpose(0, 1)
        return out, lse


LAYOUTS = (
    {},
    {"page": 1},
    {"page": 16},
    {"page": 7},
    {"leftpad": True},
    {"shuffled": True},
    {"heads_first": True},
    {"shuffled": True, "leftpad": True, "heads_first": True},
    {"page": 16, "leftpad": True},
)
OPTIONS = {
    "none": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window": (40, 0)},
    "rotary": {"causal": True, "rotary_cos": ROTARY[0], "rotary_sin": ROTARY[1]},
    "halves": {"rotary_cos": ROTARY[0], "rotary_sin": ROTARY[1], "rotary_interleaved": False},
    "many": {
        "window": (60, 1),
        "softcap": 3.0,
        "alibi_slopes": randn(4, seed=4).abs(),
        "sinks": randn(4, seed=5),
        "scale": 0.2,
    },
    "tree": {"tree_mask": randn(3, 3, 3, seed=6) > 0, "sinks": randn(4, seed=5)},
}


def pairs():
    """Every option with two layouts and two options with every layout; the others are a slow sweep."""
    for layout, option in itertools.product(LAYOUTS, OPTIONS):
        quick = layout in (LAYOUTS[0], LAYOUTS[-1]) or option in ("rotary", "many")
        yield pytest.param(layout, option, id=f"{layout}-{option}", marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize(("layout", "option"), list(pairs()))
def test_matches_the_reference(layout, option):
    for dtype, tolerance in ((torch.float32, 3e-6), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)):
        rows = Rows((0, 5, 150), dtype=dtype)
        truth = rows.double().call(layout=layout, backend="reference", **OPTIONS[option])
        for backend, ragged in itertools.product(("cpu", "reference"), (False, True)):
            out, lse = rows.call(layout=layout, ragged=ragged, backend=backend, **OPTIONS[option])
            torch.testing.assert_close(out.double(), truth[0], rtol=0, atol=tolerance * float(truth[0].abs().max()))
            torch.testing.assert_close(lse.double(), truth[1], rtol=0, atol=tolerance * 5)


@pytest.mark.parametrize(
    "sizes", [(1, 4, 1), (1, 8, 2), (1, 6, 2), (1, 7, 7), (4, 8, 2), (9, 8, 2), (9, 12, 6), (40, 4, 2)], ids=str
)
@pytest.mark.parametrize("dtype", FLOATS)
def test_layout_batch_and_threads_do_not_change_a_bit(sizes, dtype):
    new, heads, kv_heads = sizes
    rows = Rows((0, 130, 700, 1500), new, heads, kv_heads, 64, 64, dtype)
    truth = rows.call(causal=True, backend="cpu")
    for layout in LAYOUTS:
        if dtype == torch.float32 or len(layout) < 2:
            assert all(map(torch.equal, rows.call(layout=layout, causal=True, backend="cpu"), truth)), layout
    assert all(map(torch.equal, rows.call(ragged=True, causal=True, backend="cpu"), truth))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(5)
        assert all(map(torch.equal, rows.call(causal=True, backend="cpu"), truth))
    finally:
        torch.set_num_threads(threads)
    for b in range(4):
        out, lse = rows.only(b).call(causal=True, backend="cpu")
        assert torch.equal(out[0], truth[0][b]) and torch.equal(lse[0], truth[1][b])


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_ragged_rows_are_the_rows_alone(data):
    number = lambda low, high: data.draw(st.integers(low, high))
    batch, kv_heads, group, dim = number(1, 4), number(1, 3), number(1, 4), number(1, 70)
    dtype = data.draw(st.sampled_from(FLOATS))
    counts, lengths = [number(0, 12) for _ in range(batch)], [number(0, 200) for _ in range(batch)]
    page = number(1, 20)
    blocks = -(-max(a + b for a, b in zip(counts, lengths, strict=True)) // page) + 1
    table = torch.randperm(batch * blocks).reshape(batch, blocks).int()
    caches = [randn(batch * blocks, page, kv_heads, dim, seed=s, dtype=dtype) for s in (1, 2)]
    alone = [c.clone() for c in caches]
    total = sum(counts)
    q = randn(total, group * kv_heads, dim, seed=3, dtype=dtype)
    k, v = (randn(total, kv_heads, dim, seed=s, dtype=dtype) for s in (4, 5))
    cu = torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32)
    seqlens = torch.tensor(lengths, dtype=torch.int32)
    kwargs = {"causal": True, "backend": "cpu", "return_lse": True}
    out, lse = onepass.attention_with_kvcache(
        q, *caches, k, v, cache_seqlens=seqlens, block_table=table, cu_seqlens_q=cu, max_seqlen_q=max(counts), **kwargs
    )
    for b in range(batch):
        part = slice(int(cu[b]), int(cu[b + 1]))
        one = onepass.attention_with_kvcache(
            q[None, part],
            *alone,
            k[None, part],
            v[None, part],
            cache_seqlens=seqlens[b : b + 1],
            block_table=table[b : b + 1],
            **kwargs,
        )
        assert torch.equal(one[0][0], out[part]) and torch.equal(one[1][0], lse[:, part])
    assert all(map(torch.equal, caches, alone))


def append_writes_its_slots_alone(backend):
    """Shared with the tests of Triton's kernels."""
    rows = Rows(lengths=(2, 9))
    k_cache, v_cache, kwargs = rows.layout(page=4)
    k, v = randn(2, 3, 2, 32, seed=1), randn(2, 3, 2, 32, seed=2)
    before = k_cache.clone()
    onepass.attention_with_kvcache(rows.q, k_cache, v_cache, k, v, backend=backend, **kwargs)
    for b, n in enumerate(rows.lengths):
        for t in range(3):
            at = int(kwargs["block_table"][b, (n + t) // 4]), (n + t) % 4
            assert torch.equal(v_cache[at], v[b, t])
            assert torch.equal(k_cache[at], k[b, t])
            before[at] = k_cache[at]
    assert torch.equal(before.nan_to_num(7), k_cache.nan_to_num(7))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_append_writes_these_slots_and_no_other(backend):
    append_writes_its_slots_alone(backend)


def test_a_long_call_takes_constant_memory():
    """128k keys, 4 heads of 64, one query and two hundred: a thread's tiles and a few partial rows, not the scores."""
    code = """
import resource, torch, onepass
torch.set_num_threads(2)
k, v = torch.randn(2, 1, 131072, 1, 64)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run = lambda q, keys: onepass.attention_with_kvcache(q, k, v, cache_seqlens=keys, causal=True, backend="cpu")
for queries in (1, 200):
    q = torch.randn(1, queries, 4, 64)
    run(q, 1024)
    before = peak()
    run(q, 131072)
    print(peak() - before)
"""
    few, many = map(int, run_python(code).split())
    assert few < 1024                           # its scores alone would be 2 MB
    assert many < 4096                          # 400 MB


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa):
    code = """
import torch
from test_attention_kvcache import OPTIONS, Rows
torch.set_num_threads(1)
for dtype, tolerance in ((torch.float32, 3e-6), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)):
    for name, options in OPTIONS.items():
        for new in (1, 3):
            if name == "tree" and new == 1:
                continue
            rows = Rows(new=new, dtype=dtype)
            truth = rows.double().call(backend="reference", **options)[0]
            out = rows.call(backend="cpu", **options)[0]
            assert (out.double() - truth).abs().max() <= tolerance * truth.abs().max(), (dtype, name, new)
"""
    run_python(f"import sys; sys.path.insert(0, {__file__.rsplit('/', 1)[0]!r})\n" + code, ONEPASS_CPU_ISA=isa)


def test_error_of_decoding_is_that_of_torch():
    for dtype in FLOATS:
        rows = Rows((4000,), 1, 8, 2, 128, 128, dtype)
        out = rows.call(backend="cpu")[0]
        k, v = (torch.stack(x).repeat_interleave(4, 2).transpose(1, 2) for x in (rows.k, rows.v))
        same = (((rows.q.transpose(1, 2) @ k.mT) * 128**-0.5).softmax(-1) @ v).transpose(1, 2)
        assert_as_good_as_torch(out, same, rows.double().call(backend="reference")[0])


def test_int_lengths_and_reading_without_append():
    rows = Rows(lengths=(40, 40))
    k_cache, v_cache, kwargs = rows.layout()
    truth = onepass.attention(rows.q, *(torch.stack([x[:40] for x in r]) for r in (rows.k, rows.v)), backend="cpu")
    assert torch.equal(onepass.attention_with_kvcache(rows.q, k_cache, v_cache, cache_seqlens=40, backend="cpu"), truth)
    assert torch.equal(onepass.attention_with_kvcache(rows.q, k_cache, v_cache, backend="cpu", **kwargs), truth)
    none = onepass.attention_with_kvcache(rows.q, k_cache, v_cache, cache_seqlens=0, return_lse=True)
    assert not none[0].any() and torch.isneginf(none[1]).all()


def test_a_compiled_step_copies_no_cache():
    from torch._inductor.utils import run_and_get_code

    def step(q, k_cache, v_cache, k, v, seqlens):
        return onepass.attention_with_kvcache(q * 2, k_cache, v_cache, k, v, cache_seqlens=seqlens, causal=True)

    q, k, v = randn(2, 1, 4, 16, seed=1), randn(2, 1, 2, 16, seed=2), randn(2, 1, 2, 16, seed=3)
    caches, twins = ([randn(2, 77, 2, 16, seed=s) for s in (4, 5)] for _ in "ab")
    seqlens = torch.tensor([3, 76], dtype=torch.int32)
    compiled = torch.compile(step, fullgraph=True)
    out, (code,) = run_and_get_code(compiled, q, *caches, k, v, seqlens)
    assert torch.equal(out, step(q, *twins, k, v, seqlens)) and all(map(torch.equal, caches, twins))
    assert not any("77" in line and ("empty_strided" in line or "copy_" in line) for line in code.splitlines()), code
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled(q, *caches, k, v, seqlens - 1)


def test_traces():
    rows = Rows(lengths=(4, 9))
    k_cache, v_cache, kwargs = rows.layout(page=4)
    k_cache, v_cache = k_cache.nan_to_num(0), v_cache.nan_to_num(0)  # opcheck compares with ==
    seqlens, table = kwargs["cache_seqlens"], kwargs["block_table"]
    k = randn(2, 3, 2, 32, seed=1)
    torch.library.opcheck(
        torch.ops.onepass.kvcache_append.default,
        (k_cache, v_cache, k, k, seqlens, table, *(None,) * 3, 3, None, None, True),
    )
    args = (rows.q, k_cache, v_cache, seqlens, 0, table, None, None, None, 3, None, None, True, True, -1, -1, 0.0, 0.3)
    torch.library.opcheck(torch.ops.onepass.kvcache_attention.default, (*args, None, None, None))
    with torch._subclasses.FakeTensorMode():
        q, cache, new = torch.empty(5, 4, 8), torch.empty(6, 4, 2, 8), torch.empty(5, 2, 8)
        index = torch.empty(3, dtype=torch.int32)
        out, lse = onepass.attention_with_kvcache(
            q,
            cache,
            torch.empty(6, 4, 2, 9),
            new,
            torch.empty(5, 2, 9),
            cache_seqlens=index[:2],
            cu_seqlens_q=index,
            max_seqlen_q=3,
            block_table=torch.empty(2, 3, dtype=torch.int32),
            return_lse=True,
        )
        assert out.shape == (5, 4, 9) and lse.shape == (4, 5)


def test_bad_input_writes_nothing():
    rows = Rows(lengths=(2, 9))
    k, v = randn(2, 3, 2, 32, seed=1), randn(2, 3, 2, 32, seed=2)
    ints = lambda *x: torch.tensor(x, dtype=torch.int32)
    table = torch.arange(8).reshape(2, 4).int()
    bad = [
        (r"cache_seqlens\[1\]=30 with 3 new keys: expected 0 to the capacity, 19", {"cache_seqlens": ints(2, 30)}),
        (r"cache_seqlens\[0\]=-1", {"cache_seqlens": ints(-1, 3)}),
        (r"cache_seqlens\[0\]=17 with", {"cache_seqlens": 17}),
        (r"cache_seqlens has shape \(3,\)", {"cache_seqlens": ints(1, 2, 3)}),
        (r"cache_seqlens has dtype torch.int64, expected int32", {"cache_seqlens": torch.tensor([1, 2])}),
        (r"cache_leftpad\[1\]=13: expected 0 to the row's length, 12", {"cache_leftpad": ints(0, 13)}),
        (r"cache_batch_idx is \[0, 2\], expected 0 to 1", {"cache_batch_idx": ints(0, 2)}),
        (r"cache_batch_idx is \[1, 1\]: two rows", {"cache_batch_idx": ints(1, 1)}),
        (
            r"rotary_cos has 8 positions, this call reaches position 11",
            {"rotary_cos": ROTARY[0][:8], "rotary_sin": ROTARY[1][:8]},
        ),
        (r"rotary_cos has shape \(9, 17\)", {"rotary_cos": torch.ones(9, 17), "rotary_sin": torch.ones(9, 17)}),
        ("rotary_cos and rotary_sin: expected both", {"rotary_cos": ROTARY[0]}),
        (r"tree_mask is torch.bool \(2, 2, 2\), expected bool \(2, 3, 3\)", {"tree_mask": torch.ones(2, 2, 2).bool()}),
        ("max_seqlen_q=3: expected an int with cu_seqlens_q, else None", {"max_seqlen_q": 3}),
        ("k_scale is given with a cache of torch.float32", {"k_scale": torch.ones(1)}),
    ]
    for backend in ("cpu", "reference"):
        k_cache, v_cache, kwargs = rows.layout()
        before = k_cache.clone(), v_cache.clone()
        for message, options in bad:
            with pytest.raises((ValueError, TypeError), match=message):
                onepass.attention_with_kvcache(rows.q, k_cache, v_cache, k, v, backend=backend, **(kwargs | options))
        wrong, paged = table.clone(), torch.zeros(8, 4, 2, 32)
        wrong[1, 2] = 9
        with pytest.raises(ValueError, match=r"block_table\[1, 2\]=9: expected a page from 0 to 7"):
            onepass.attention_with_kvcache(
                rows.q, paged, paged.clone(), k, v, block_table=wrong, backend=backend, **kwargs
            )
        with pytest.raises(ValueError, match="block_table and cache_batch_idx are both given"):
            onepass.attention_with_kvcache(
                rows.q, k_cache, v_cache, k, v, block_table=table, cache_batch_idx=ints(0, 1), backend=backend, **kwargs
            )
        assert not paged.any()
        for now, then in zip((k_cache, v_cache), before, strict=True):
            assert torch.equal(now.nan_to_num(7), then.nan_to_num(7))
    with pytest.raises(ValueError, match="q requires a gradient: the cache is for inference"):
        onepass.attention_with_kvcache(rows.q.clone().requires_grad_(), k_cache, v_cache, **kwargs)


def test_the_kernel_itself_refuses_what_points_outside():
    rows = Rows(lengths=(2, 9))
    k_cache, v_cache, _ = rows.layout()
    tail = (None, None, None, None, 3, None, None, True, True, -1, -1, 0.0, 0.3, None, None, None)
    seqlens = torch.tensor([2, 10**6], dtype=torch.int32)
    with pytest.raises(ValueError, match="cache_seqlens points outside the cache"):
        native.kvcache_attention(rows.q, k_cache, v_cache, seqlens, 0, *tail)
    with pytest.raises(ValueError, match=r"cache_seqlens\[1\]=1000000 with 0 new keys"):
        torch.ops.onepass.kvcache_attention(rows.q, k_cache, v_cache, seqlens, 0, *tail, backend="cpu")


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("mode", ["compile", "autocast", "make_fx"])
def test_traced_calls_refuse_bad_values_before_they_write(mode, backend):
    rows = Rows(lengths=(2, 9))
    k, v = randn(2, 3, 2, 32, seed=1), randn(2, 3, 2, 32, seed=2)
    k_cache, v_cache, kwargs = rows.layout()
    good = torch.tensor([0, 0], dtype=torch.int32)

    def step(seqlens, pads):
        return onepass.attention_with_kvcache(
            rows.q, k_cache, v_cache, k, v, cache_seqlens=seqlens, cache_leftpad=pads, backend=backend
        )

    if mode == "compile":
        run = torch.compile(step, backend="aot_eager", fullgraph=True)
    elif mode == "make_fx":
        run = torch.fx.experimental.proxy_tensor.make_fx(step)(kwargs["cache_seqlens"], good)
    else:
        run = torch.autocast("cpu", torch.bfloat16)(step)
    before = k_cache.clone(), v_cache.clone()
    bad_length, bad_pad = torch.tensor([2, 30], dtype=torch.int32), torch.tensor([0, 13], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"cache_seqlens\[1\]=30 with 3 new keys: expected 0 to the capacity, 19"):
        run(bad_length, good)
    with pytest.raises(ValueError, match=r"cache_leftpad\[1\]=13: expected 0 to the row's length, 12"):
        run(kwargs["cache_seqlens"], bad_pad)
    for now, then in zip((k_cache, v_cache), before, strict=True):
        assert torch.equal(now.nan_to_num(7), then.nan_to_num(7))
    run(kwargs["cache_seqlens"], good)
    assert not torch.equal(k_cache.nan_to_num(7), before[0].nan_to_num(7)) or mode == "make_fx"


def test_queries_stay_inside_the_rotary_table():
    rows = Rows(lengths=(2, 9))
    k_cache, v_cache, kwargs = rows.layout()
    table = {"rotary_cos": ROTARY[0][:11], "rotary_sin": ROTARY[1][:11]}
    k, v = randn(2, 1, 2, 32, seed=1), randn(2, 1, 2, 32, seed=2)
    with pytest.raises(ValueError, match="rotary_cos has 11 positions, this call reaches position 11"):
        onepass.attention_with_kvcache(rows.q, k_cache, v_cache, k, v, causal=True, **kwargs, **table)
