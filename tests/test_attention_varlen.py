"""Attention over ragged rows: every row is that row through `attention`; pages, poison, gradients, tracing, errors."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import onepass

from cases import FLOATS, RAGGED
from helpers import CPU, ISAS, assert_as_good_as_torch, needs_native, run_python
from test_attention import core, in_float64, randn

BACKENDS = ["reference", CPU]
OPTIONS = {
    "none": {},
    "causal": {"causal": True},
    "window": {"window": (20, 3)},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": randn(4, seed=5), "causal": True},
    "alibi": {"alibi_slopes": randn(4, seed=4).abs(), "causal": True},
    "many": {"window": (60, -1), "causal": True, "softcap": 3.0, "alibi_slopes": randn(4, seed=4).abs() * 0.1,
             "sinks": randn(4, seed=5), "scale": 0.3},
}  # fmt: skip


def ends(counts) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32)


class Ragged:
    """q, k and v of rows with these (queries, keys), packed end to end."""

    def __init__(self, rows, heads=4, kv_heads=2, dim=32, value_dim=24, dtype=torch.float32):
        self.rows, self.batch = rows, len(rows)
        self.n_q, self.n_k = [n for n, _ in rows], [n for _, n in rows]
        self.cu_q, self.cu_k = ends(self.n_q), ends(self.n_k)
        self.q = randn(sum(self.n_q), heads, dim, seed=1, dtype=dtype)
        self.k = randn(sum(self.n_k), kv_heads, dim, seed=2, dtype=dtype)
        self.v = randn(sum(self.n_k), kv_heads, value_dim, seed=3, dtype=dtype)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.q, self.k, self.v

    def lengths(self) -> tuple:
        return self.cu_q, self.cu_k, max(self.n_q, default=0), max(self.n_k, default=0)

    def call(self, **kwargs):
        return onepass.attention_varlen(*self.tensors(), *self.lengths(), return_lse=True, **kwargs)

    def pages(self, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """k and v in shuffled pages, NaN in every other slot; past a row's end the table names no page that exists."""
        blocks = max((-(-n // size) for n in self.n_k), default=0) + 1
        table = torch.randperm(self.batch * blocks + 2, generator=torch.Generator().manual_seed(1)).int()
        table = table[: self.batch * blocks].reshape(self.batch, blocks).clone()
        stores = []
        for x in (self.k, self.v):
            store = torch.full((self.batch * blocks + 2, size, *x.shape[1:]), torch.nan, dtype=x.dtype)
            for b, n in enumerate(self.n_k):
                slot = torch.arange(n)
                store[table[b, slot // size].long(), slot % size] = x[self.cu_k[b] : self.cu_k[b + 1]]
            stores.append(store)
        for b, n in enumerate(self.n_k):
            table[b, -(-n // size) :] = 2**30
        return *stores, table

    def row(self, b: int, x: torch.Tensor) -> torch.Tensor:
        cu = self.cu_q if x is self.q else self.cu_k
        return x[None, cu[b] : cu[b + 1]]

    def alone(self, b: int, function=onepass.attention, **kwargs):
        if (slopes := kwargs.get("alibi_slopes")) is not None and slopes.dim() == 2:
            kwargs["alibi_slopes"] = slopes[b]
        return function(*(self.row(b, x) for x in self.tensors()), **kwargs)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", RAGGED, ids=str)
def test_as_good_as_torch(rows, backend, option):
    for dtype in FLOATS:
        case, chosen = Ragged(rows, dtype=dtype), OPTIONS[option]
        out, lse = case.call(backend=backend, **chosen)
        assert out.dtype == dtype and lse.dtype == torch.float32
        assert out.shape == (len(case.q), 4, 24) and lse.shape == (4, len(case.q))
        wide = Ragged(rows)
        wide.q, wide.k, wide.v = (x.double() for x in case.tensors())
        none = (out.new_zeros(0, 4, 24).double(), torch.zeros(4, 0).double())
        truth = [wide.alone(b, return_lse=True, backend="reference", **in_float64(chosen)) for b in range(len(rows))]
        same = [case.alone(b, core, **chosen) for b in range(len(rows))]
        singles = Ragged(rows)
        singles.q, singles.k, singles.v = (x.float() for x in case.tensors())
        same_lse = [singles.alone(b, core, **chosen)[1][0] for b in range(len(rows))]
        joined = [torch.cat([none[0], *(o[0] for o, _ in pairs)]) for pairs in (same, truth)]
        assert_as_good_as_torch(out, joined[0], joined[1], "out")
        true_lse = torch.cat([none[1], *(x[0] for _, x in truth)], 1)
        assert_as_good_as_torch(lse, torch.cat([none[1].float(), *same_lse], 1), true_lse, "lse")


@needs_native
@pytest.mark.parametrize("option", ["none", "causal", "many"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_row_has_the_bits_of_that_row_through_attention(dtype, option):
    chosen = dict(OPTIONS[option], backend="cpu")
    case = Ragged(((1, 900), (3, 0), (0, 5), (130, 130), (7, 333), (40, 9)), dtype=dtype)
    out, lse = case.call(**chosen)
    for b in range(case.batch):
        at = slice(int(case.cu_q[b]), int(case.cu_q[b + 1]))
        one, one_lse = case.alone(b, return_lse=True, **chosen)
        assert torch.equal(one[0], out[at]) and torch.equal(one_lse[0], lse[:, at]), b
    for size in (1, 7, 16):
        k, v, table = case.pages(size)
        paged = onepass.attention_varlen(
            case.q, k, v, *case.lengths(), block_table=table, return_lse=True, **chosen
        )
        assert torch.equal(paged[0], out) and torch.equal(paged[1], lse), size
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(5)
        assert all(map(torch.equal, case.call(**chosen), (out, lse)))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_unused_slots_of_pages_are_never_read(backend):
    case = Ragged(((2, 9), (1, 0), (0, 4), (5, 33)))
    k, v, table = case.pages(4)
    out, lse = onepass.attention_varlen(
        case.q, k, v, *case.lengths(), block_table=table, causal=True, return_lse=True, backend=backend
    )
    truth = case.call(causal=True, backend="reference")
    torch.testing.assert_close((out, lse), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_in_its_row(backend):
    case = Ragged(((4, 6), (5, 5), (3, 70)))
    case.k[int(case.cu_k[1]) + 2] = torch.nan
    out = case.call(backend=backend)[0]
    at = slice(int(case.cu_q[1]), int(case.cu_q[2]))
    assert out[at].isnan().all() and out[: at.start].isfinite().all() and out[at.stop :].isfinite().all()


@needs_native
@settings(max_examples=30, deadline=None)
@given(st.data())
def test_views_and_slopes_by_row(data):
    number = lambda low, high: data.draw(st.integers(low, high))
    rows = [(number(0, 70), number(0, 150)) for _ in range(number(1, 5))]
    kv_heads, group, dtype = number(1, 3), number(1, 4), data.draw(st.sampled_from(FLOATS))
    case = Ragged(rows, kv_heads * group, kv_heads, number(1, 70), number(1, 70), dtype)
    chosen = {"causal": data.draw(st.booleans()), "alibi_slopes": randn(len(rows), kv_heads * group).abs() * 0.1}
    out, lse = case.call(backend="cpu", **chosen)
    view = lambda x: torch.cat([x, x], -1).transpose(0, 1).contiguous().transpose(0, 1)[..., x.shape[-1] :]
    strided = [view(x) for x in case.tensors()]
    given_out = torch.empty(out.shape[::-1], dtype=dtype).permute(2, 1, 0)
    again = onepass.attention_varlen(*strided, *case.lengths(), out=given_out, return_lse=True, backend="cpu", **chosen)
    assert again[0] is given_out and torch.equal(again[0], out) and torch.equal(again[1], lse)
    truth = case.call(backend="reference", **chosen)
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 5e-3}[dtype]
    torch.testing.assert_close(out, truth[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse, truth[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa):
    code = f"""
import sys; sys.path.insert(0, {__file__.rsplit("/", 1)[0]!r})
import torch
from test_attention_varlen import OPTIONS, Ragged
torch.set_num_threads(1)
for chosen in OPTIONS.values():
    case = Ragged(((1, 300), (3, 0), (70, 90)))
    torch.testing.assert_close(case.call(backend="cpu", **chosen), case.call(backend="reference", **chosen),
                               rtol=2e-5, atol=2e-5)
"""
    run_python(code, ONEPASS_CPU_ISA=isa)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("option", OPTIONS)
def test_gradients_are_those_of_each_row(option, backend):
    case = Ragged(((3, 5), (0, 2), (4, 0), (9, 9), (6, 2)), dim=8, value_dim=12)
    chosen = dict(OPTIONS[option])
    leaves = [x.requires_grad_() for x in case.tensors()]
    sinks = chosen.get("sinks")
    wide = Ragged(case.rows, dim=8, value_dim=12)
    wide.q, wide.k, wide.v = (x.detach().double().requires_grad_() for x in leaves)
    true_leaves, true_chosen = list(wide.tensors()), in_float64(chosen)
    if sinks is not None:
        chosen["sinks"] = sinks.clone().requires_grad_()
        true_chosen["sinks"] = sinks.double().requires_grad_()
        leaves.append(chosen["sinks"])
        true_leaves.append(true_chosen["sinks"])

    def loss(pairs):
        return sum(o.square().sum() + x[x.isfinite()].sin().sum() for o, x in pairs)

    got = torch.autograd.grad(loss([case.call(backend=backend, **chosen)]), leaves)
    alone = [wide.alone(b, return_lse=True, backend="reference", **true_chosen) for b in range(case.batch)]
    truth = torch.autograd.grad(loss(alone), true_leaves)
    for a, b in zip(got, truth, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


def test_gradcheck_of_the_reference():
    case = Ragged(((2, 3), (0, 1), (3, 2)), heads=2, kv_heads=1, dim=3, value_dim=2, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (*case.tensors(), randn(2, seed=9, dtype=torch.float64))]

    def run(q, k, v, sinks):
        return onepass.attention_varlen(
            q, k, v, *case.lengths(), sinks=sinks, softcap=2.0, causal=True, return_lse=True, backend="reference"
        )

    assert torch.autograd.gradcheck(run, leaves)


@needs_native
def test_a_rows_gradients_do_not_depend_on_the_others():
    case = Ragged(((70, 90), (5, 5), (33, 64)), dim=16, value_dim=16)
    leaves = [x.requires_grad_() for x in case.tensors()]
    together = torch.autograd.grad(case.call(causal=True, backend="cpu")[0].square().sum(), leaves)
    for b in range(case.batch):
        one = torch.autograd.grad(case.alone(b, causal=True, backend="cpu").square().sum(), leaves)
        for cu, a, whole in zip((case.cu_q, case.cu_k, case.cu_k), one, together, strict=True):
            at = slice(int(cu[b]), int(cu[b + 1]))
            assert torch.equal(a[at], whole[at])


def test_traces():
    case = Ragged(((3, 5), (2, 9)), dim=16, value_dim=16)
    q, k, v = (x.requires_grad_() for x in case.tensors())
    lengths, sinks = case.lengths(), randn(4, seed=5).requires_grad_()
    args = (q, k, v, *lengths, None, True, 4, -1, 2.0, 0.25, randn(4, seed=6).abs(), sinks)
    torch.library.opcheck(torch.ops.onepass.attention_varlen_forward.default, args)
    pages = case.pages(4)
    paged = (q.detach(), *(x.nan_to_num(0) for x in pages[:2]), *lengths, pages[2], *args[8:-1], None)
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")    # the fourth asks for a gradient
    torch.library.opcheck(torch.ops.onepass.attention_varlen_forward.default, paged, test_utils=utilities)
    out, lse = (x.detach() for x in torch.ops.onepass.attention_varlen_forward(*args))
    plain = tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in args)
    backward = (torch.ones_like(out), lse, *plain[:3], out, lse, *lengths, *plain[8:])
    torch.library.opcheck(torch.ops.onepass.attention_varlen_backward.default, backward)

    def loss(q, k, v, cu_q, cu_k):
        return onepass.attention_varlen(q, k, v, cu_q, cu_k, *lengths[2:], causal=True, sinks=sinks).sin().sum()

    truth = torch.autograd.grad(loss(q, k, v, *lengths[:2]), (q, k, v))
    compiled = torch.compile(loss, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            torch.testing.assert_close(torch.autograd.grad(compiled(q, k, v, *lengths[:2]), (q, k, v)), truth)
    with pytest.raises(ValueError, match=r"cu_seqlens_k is \[0, 5, 13\], expected to rise from 0 to the 14 rows of k"):
        compiled(q, k, v, lengths[0], ends((5, 8)))
    graph = torch.fx.experimental.proxy_tensor.make_fx(lambda *x: onepass.attention_varlen(*x, *lengths[2:]))
    plain = [x.detach() for x in (q, k, v)]
    torch.testing.assert_close(
        graph(*plain, *lengths[:2])(*plain, *lengths[:2]), onepass.attention_varlen(*plain, *lengths)
    )
    stacked = [torch.stack([x, x + 1]) for x in plain]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # functorch says that it loops
        mapped = torch.func.vmap(lambda *x: onepass.attention_varlen(*x, *lengths))(*stacked)
    torch.testing.assert_close(mapped[1], onepass.attention_varlen(*(x[1] for x in stacked), *lengths))
    with torch._subclasses.FakeTensorMode():
        index = torch.empty(3, dtype=torch.int32)
        out, lse = onepass.attention_varlen(
            torch.empty(7, 4, 8), torch.empty(9, 2, 8), torch.empty(9, 2, 5), index, index, 4, 5, return_lse=True
        )
        assert out.shape == (7, 4, 5) and lse.shape == (4, 7)


def test_autocast_and_flops():
    case = Ragged(((3, 5), (2, 9)))
    with torch.autocast("cpu", torch.bfloat16):
        out = case.call()[0]
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, onepass.attention_varlen(*(x.bfloat16() for x in case.tensors()), *case.lengths()))
    with FlopCounterMode(display=False) as counter:
        case.call()
    assert counter.get_total_flops() == 2 * 4 * (3 * 5 + 2 * 9) * (32 + 24)


def test_bad_input_says_what_and_why():
    case = Ragged(((3, 5), (2, 9)))
    q, k, v = case.tensors()
    cu_q, cu_k, max_q, max_k = case.lengths()
    k_pages, v_pages, table = case.pages(4)
    written = torch.full((5, 4, 24), 7.0)
    good = {"q": q, "k": k, "v": v, "cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}
    good |= {"max_seqlen_q": max_q, "max_seqlen_k": max_k}
    paged = {"k": k_pages, "v": v_pages, "block_table": table}
    low = table.clone()
    low[1, 2] = -1
    bad = [
        (r"q has shape \(1, 5, 4, 32\), expected \[total, H, D\]", ValueError, {"q": q[None]}),
        (r"k has shape .* expected \[pages, page_size, Hkv, D\]", ValueError, {"block_table": table}),
        ("v has dtype torch.float16, expected that of q", TypeError, {"v": v.half()}),
        (r"v has shape .* expected 14 in dim 0 \(as k\)", ValueError, {"v": v[:3]}),
        ("v has head dim 300, expected 1 to 256", ValueError, {"v": torch.zeros(14, 2, 300)}),
        ("q has 3 heads, expected a positive multiple of k's 2", ValueError, {"q": q[:, :3]}),
        ("cu_seqlens_q: expected an int32 tensor", ValueError, {"cu_seqlens_q": [0, 5]}),
        ("cu_seqlens_k is None, expected an int32", TypeError, {"cu_seqlens_k": None}),
        ("cu_seqlens_k has dtype torch.int64, expected int32", TypeError, {"cu_seqlens_k": cu_k.long()}),
        (r"cu_seqlens_k has shape \(2,\), expected \[B \+ 1\] = \[3\]", ValueError, {"cu_seqlens_k": cu_k[:2]}),
        (r"cu_seqlens_q is \[0, 3, 4\], expected to rise from 0 to the 5 rows of q", ValueError,
         {"cu_seqlens_q": ends((3, 1))}),
        (r"cu_seqlens_q is \[0, 7, 5\], expected to rise", ValueError, {"cu_seqlens_q": ends((7, -2))}),
        (r"cu_seqlens_k is \[1, 5, 14\], expected to rise", ValueError, {"cu_seqlens_k": ends((5, 9)).clamp(1)}),
        ("max_seqlen_q=2: cu_seqlens_q has a row of 3", ValueError, {"max_seqlen_q": 2}),
        ("max_seqlen_k=8: cu_seqlens_k has a row of 9", ValueError, {"max_seqlen_k": 8}),
        ("max_seqlen_k is float, expected an int", TypeError, {"max_seqlen_k": 9.0}),
        ("max_seqlen_q=-1: expected 0 or more", ValueError, {"max_seqlen_q": -1}),
        (r"block_table has shape \(1, 4\), expected \[B, blocks\] with B = 2", ValueError,
         paged | {"block_table": table[:1]}),
        (r"block_table\[1, 2\]=-1: expected a page from 0 to 9", ValueError, paged | {"block_table": low}),
        ("cu_seqlens_k gives row 1 9 keys, its pages in block_table hold 8", ValueError,
         paged | {"block_table": table[:, :2]}),
        ("q requires a gradient: pages are for inference", ValueError, paged | {"q": q.clone().requires_grad_()}),
        (r"sinks has shape \(2,\), expected \(4,\)", ValueError, {"sinks": torch.ones(2)}),
        (r"out has shape \(5, 4, 32\), expected \(5, 4, 24\)", ValueError, {"out": torch.empty_like(q)}),
    ]  # fmt: skip
    for backend, (message, error, change) in itertools.product(("cpu", "reference"), bad):
        with pytest.raises(error, match=message):
            onepass.attention_varlen(**({"out": written} | good | change), backend=backend)
    assert (written == 7).all()
