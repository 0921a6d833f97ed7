"""Attention over plain tensors and the merging of partial results: kernels, gradients, tracing, errors."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import onepass
from onepass.reference import attention as reference

from cases import ATTENTION, FLOATS
from helpers import ISAS, assert_as_good_as_torch, run_python

OPTIONS = ("none", "causal", "window", "softcap", "alibi", "sinks", "bool", "additive", "many")


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), device="cpu")
    return x.to(torch.get_default_device(), dtype)


def inputs(case: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    b, sq, sk, h, hkv, d, dv = case
    return (
        randn(b, sq, h, d, seed=1, dtype=dtype),
        randn(b, sk, hkv, d, seed=2, dtype=dtype),
        randn(b, sk, hkv, dv, seed=3, dtype=dtype),
    )


def options(name: str, case: tuple[int, ...]) -> dict:
    b, sq, sk, h, *_ = case
    chosen = {
        "none": {},
        "causal": {"causal": True},
        "window": {"window": (20, 3)},
        "softcap": {"softcap": 1.5},
        "alibi": {"alibi_slopes": randn(b, h, seed=4).abs(), "causal": True},
        "sinks": {"sinks": randn(h, seed=5)},
        "bool": {"mask": randn(b, 1, sq, sk, seed=6) > -0.5},
        "additive": {"mask": randn(h, 1, sk, seed=7)},
        "many": {
            "causal": True,
            "window": (100, -1),
            "softcap": 4.0,
            "alibi_slopes": randn(h, seed=4).abs() * 0.1,
            "sinks": randn(h, seed=5),
            "mask": randn(sq, 1, seed=6) > -1.5,
            "scale": 0.3,
        },
    }
    return chosen[name]


def in_float64(kwargs: dict) -> dict:
    return {n: x.double() if isinstance(x, torch.Tensor) and x.dtype != torch.bool else x for n, x in kwargs.items()}


def core(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
    """The textbook in the dtype of q, step by step: what its rounding costs PyTorch itself."""
    groups, dtype = q.shape[2] // k.shape[2], q.dtype
    k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * kwargs.get("scale", q.shape[-1] ** -0.5)
    if cap := kwargs.get("softcap"):
        scores = cap * torch.tanh(scores / cap)
    distance = reference.diagonal(q.shape[1], k.shape[1], q.device)[None]
    if (slopes := kwargs.get("alibi_slopes")) is not None:
        scores = scores - slopes.reshape(-1, q.shape[2], 1, 1).to(dtype) * distance.abs()
    allowed = reference.inside(distance, kwargs.get("causal", False), *kwargs.get("window", (-1, -1)))[:, None]
    mask = kwargs.get("mask")
    if mask is not None and mask.dtype == torch.bool:
        allowed = allowed & mask
    elif mask is not None:
        scores = scores + mask.to(dtype)
    scores = scores.masked_fill(~allowed, -torch.inf)
    sinks = kwargs.get("sinks")
    columns = [scores] if sinks is None else [scores, sinks.to(dtype).reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)]
    wide = torch.cat(columns, -1)
    lse = torch.logsumexp(wide, -1) if wide.shape[-1] else wide.new_full(wide.shape[:-1], -torch.inf)
    probs = wide.softmax(-1).nan_to_num(0)[..., : k.shape[1]]
    return torch.einsum("bhij,bjhd->bihd", probs, v), lse


def sweep():
    """Every option with every small case; of the large ones some, the rest is slow."""
    for backend, case, option in itertools.product(("cpu", "reference"), ATTENTION, OPTIONS):
        b, sq, sk, h, _, d, _ = case
        large = b * sq * sk * h * d > 1_000_000
        quick = not large or (backend == "cpu" and option in ("none", "causal", "many"))
        marks = () if quick else pytest.mark.slow
        yield pytest.param(case, option, backend, id=f"{backend}-{case}-{option}", marks=marks)


@pytest.mark.parametrize(("case", "option", "backend"), list(sweep()))
def test_as_good_as_torch(case, option, backend):
    for dtype in FLOATS:
        q, k, v = inputs(case, dtype)
        chosen = options(option, case)
        out, lse = onepass.attention(q, k, v, return_lse=True, backend=backend, **chosen)
        truth = onepass.attention(
            q.double(), k.double(), v.double(), return_lse=True, backend="reference", **in_float64(chosen)
        )
        same = core(q, k, v, **chosen)
        assert out.dtype == dtype and lse.dtype == torch.float32
        assert_as_good_as_torch(out, same[0], truth[0], "out")
        assert_as_good_as_torch(lse, core(q.float(), k.float(), v.float(), **chosen)[1], truth[1], "lse")


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa):
    code = """
import itertools, torch, onepass
from test_attention import ATTENTION, OPTIONS, inputs, options, in_float64, core
from test_attention import test_keys_masked_by_the_least_number_share_a_row_that_sees_no_others
from helpers import assert_as_good_as_torch
assert onepass._native._C.isa == {isa!r}
torch.set_num_threads(1)
for case in ATTENTION[2:6]:
    for option in OPTIONS:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            q, k, v = inputs(case, dtype)
            chosen = options(option, case)
            out = onepass.attention(q, k, v, backend="cpu", **chosen)
            truth = onepass.attention(*(x.double() for x in (q, k, v)), **in_float64(chosen), backend="reference")
            assert_as_good_as_torch(out, core(q, k, v, **chosen)[0], truth)
for queries, dtype in itertools.product((2, 40), (torch.float32, torch.bfloat16)):
    test_keys_masked_by_the_least_number_share_a_row_that_sees_no_others(queries, dtype)
"""
    run_python(
        f"import sys; sys.path.insert(0, {__file__.rsplit('/', 1)[0]!r})\n" + code.format(isa=isa), ONEPASS_CPU_ISA=isa
    )


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_views_with_strides_and_offsets(data):
    number = lambda low, high: data.draw(st.integers(low, high))
    b, sq, sk, hkv, group, d = number(2, 3), number(8, 20), number(1, 150), number(1, 3), number(1, 5), number(1, 70)
    sq = max(sq, -(-1000 // (b * hkv * group * d)))     # the rule compares the largest errors: of a few outputs, luck
    dtype = data.draw(st.sampled_from(FLOATS))

    def view(s: int, h: int, seed: int) -> torch.Tensor:
        lead, order = number(0, 3), data.draw(st.sampled_from([(0, 1, 2), (1, 0, 2), (0, 2, 1), (2, 1, 0)]))
        sizes = (b, s, h)
        base = randn(*(sizes[i] + 1 for i in order), d + lead, seed=seed, dtype=dtype)
        back = [order.index(i) for i in range(3)]
        return base.permute(*back, 3)[1:, 1:, 1:, lead:]

    q, k, v = view(sq, hkv * group, 1), view(sk, hkv, 2), view(sk, hkv, 3)
    causal = data.draw(st.booleans())
    out = onepass.attention(q, k, v, causal=causal, backend="cpu")
    assert torch.equal(
        out, onepass.attention(q.contiguous(), k.contiguous(), v.contiguous(), causal=causal, backend="cpu")
    )
    truth = onepass.attention(q.double(), k.double(), v.double(), causal=causal, backend="reference")
    assert_as_good_as_torch(out, core(q, k, v, causal=causal)[0], truth)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("queries", [1, 2, 5, 9, 40])
def test_half_types_round_nothing_on_the_way_to_the_lse(queries, dtype):
    q, k, v = inputs((1, queries, 300, 8, 2, 64, 64), dtype)
    lse = onepass.attention(q, k, v, causal=True, return_lse=True, backend="cpu")[1]
    truth = core(q.double(), k.double(), v.double(), causal=True)[1]
    torch.testing.assert_close(lse.double(), truth, rtol=0, atol=4e-6)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "case",
    [(4, 1, 900, 8, 2, 64, 64), (2, 1, 9001, 4, 2, 16, 16), (3, 40, 333, 4, 2, 32, 32), (2, 150, 150, 4, 4, 64, 64)],
)
def test_a_row_alone_has_the_same_bits(case, dtype):
    q, k, v = inputs(case, dtype)
    together = onepass.attention(q, k, v, causal=True, return_lse=True, backend="cpu")
    threads = torch.get_num_threads()
    try:
        for n in (1, 3, 8):
            torch.set_num_threads(n)
            again = onepass.attention(q, k, v, causal=True, return_lse=True, backend="cpu")
            assert all(map(torch.equal, together, again))
    finally:
        torch.set_num_threads(threads)
    for b in range(case[0]):
        alone = onepass.attention(q[b : b + 1], k[b : b + 1], v[b : b + 1], causal=True, return_lse=True, backend="cpu")
        assert torch.equal(alone[0][0], together[0][b]) and torch.equal(alone[1][0], together[1][b])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("queries", [2, 40])
@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_a_scale_may_turn_scores_around(scale, queries, dtype):
    q, k, v = inputs((1, queries, 100, 8, 2, 64, 64), dtype)
    truth = onepass.attention(q.double(), k.double(), v.double(), scale=scale, causal=True, backend="reference")
    out = onepass.attention(q, k, v, scale=scale, causal=True, backend="cpu")
    assert_as_good_as_torch(out, core(q, k, v, scale=scale, causal=True)[0], truth)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("queries", [2, 40])
def test_keys_masked_by_the_least_number_share_a_row_that_sees_no_others(queries, dtype):
    """As PyTorch has it: finite, where a product with the score would overflow."""
    q, k, v = inputs((1, queries, 100, 8, 2, 64, 64), dtype)
    mask = torch.full((queries, 100), torch.finfo(torch.float32).min)
    mask[1::2, 50:] = 0
    truth = onepass.attention(q.double(), k.double(), v.double(), mask=mask.double(), backend="reference")
    out = onepass.attention(q, k, v, mask=mask, backend="cpu")
    torch.testing.assert_close(out[0, 0], v.float().mean(1)[0].repeat_interleave(4, 0).to(dtype))
    assert_as_good_as_torch(out, core(q.float(), k.float(), v.float(), mask=mask)[0].to(dtype), truth)


def test_nan_shows_where_it_is_and_nowhere_else():
    q, k, v = inputs((1, 100, 100, 2, 2, 64, 64))
    k[0, 70, 1] = torch.nan
    out = onepass.attention(q, k, v, causal=True, backend="cpu")
    assert out[0, :, 0].isfinite().all() and out[0, :70, 1].isfinite().all() and out[0, 70:, 1].isnan().all()


def test_out_is_filled():
    q, k, v = inputs((2, 5, 9, 4, 2, 16, 24))
    truth = onepass.attention(q, k, v)
    for backend in ("cpu", "reference"):
        for out in (
            torch.empty(2, 5, 4, 24),
            torch.empty(2, 4, 5, 24).transpose(1, 2),
            torch.empty(24, 5, 4, 2).permute(3, 1, 2, 0),
        ):
            got = onepass.attention(q, k, v, out=out, backend=backend)
            assert got is out
            torch.testing.assert_close(out, truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("option", ["none", "causal", "softcap", "alibi", "sinks", "bool", "many"])
def test_gradients(option):
    case = (2, 6, 11, 4, 2, 8, 12)
    leaves = [x.requires_grad_() for x in inputs(case)]
    chosen = options(option, case)
    sinks = chosen.get("sinks")
    wide = [x.detach().double().requires_grad_() for x in (*leaves, *(() if sinks is None else (sinks,)))]
    if sinks is not None:
        chosen["sinks"] = sinks.requires_grad_()
        leaves.append(sinks)
    out, lse = onepass.attention(*leaves[:3], return_lse=True, **chosen)
    chosen = in_float64(chosen) | ({} if sinks is None else {"sinks": wide[3]})
    left, right = chosen.pop("window", (-1, -1))
    args = (chosen.get("causal", False), left, right, chosen.get("softcap", 0.0), chosen.get("scale", case[5] ** -0.5))
    tables = [chosen.get(n) for n in ("alibi_slopes", "sinks", "mask")]
    tables[2] = None if tables[2] is None else tables[2].reshape((1,) * (4 - tables[2].dim()) + tuple(tables[2].shape))
    true_out, true_lse = reference.attention_forward(*wide[:3], *args, *tables)
    seen = true_lse.isfinite()
    got = torch.autograd.grad(out.square().sum() + lse[seen].sin().sum(), leaves)
    truth = torch.autograd.grad(true_out.square().sum() + true_lse[seen].sin().sum(), wide)
    for a, b in zip(got, truth, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


def test_merge_differentiates():
    outs, lses = (x.double().requires_grad_() for x in (randn(3, 2, 4, 2, 3), randn(3, 2, 2, 4, seed=1)))
    taken = randn(2, seed=2).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b, c: onepass.merge_attention(a, b, sinks=c), (outs, lses, taken))
    torch.library.opcheck(torch.ops.onepass.merge_attention.default, (outs, lses, taken))
    single = [x.detach().float().requires_grad_() for x in (outs, lses, taken)]
    torch.library.opcheck(torch.ops.onepass.merge_attention.default, tuple(single))


def test_traces():
    case = (2, 5, 9, 4, 2, 16, 16)
    q, k, v = (x.requires_grad_() for x in inputs(case))
    sinks, mask = randn(4, seed=5).requires_grad_(), options("bool", case)["mask"]
    args = (q, k, v, True, 4, -1, 2.0, 0.25, randn(4, seed=6).abs(), sinks, mask)
    torch.library.opcheck(torch.ops.onepass.attention_forward.default, args)

    def loss(q, k, v):
        return onepass.attention(q, k, v, causal=True, sinks=sinks, mask=mask).sin().sum()

    truth = torch.autograd.grad(loss(q, k, v), (q, k, v))
    compiled = torch.compile(loss, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            torch.testing.assert_close(torch.autograd.grad(compiled(q, k, v), (q, k, v)), truth)
    plain = [x.detach() for x in (q, k, v)]
    graph = torch.fx.experimental.proxy_tensor.make_fx(lambda *x: onepass.attention(*x, causal=True))(*plain)
    torch.testing.assert_close(graph(*plain), onepass.attention(*plain, causal=True))
    with torch._subclasses.FakeTensorMode():
        out, lse = onepass.attention(*(torch.empty(x.shape) for x in plain), return_lse=True)
        assert out.shape == (2, 5, 4, 16) and lse.shape == (2, 4, 5)
    stacked = [torch.stack([x, x + 1]) for x in plain]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # functorch says that it loops
        mapped = torch.func.vmap(onepass.attention)(*stacked)
    torch.testing.assert_close(mapped[1], onepass.attention(*(x[1] for x in stacked)))


def test_autocast_and_flops():
    q, k, v = inputs((2, 5, 9, 4, 2, 16, 24))
    with torch.autocast("cpu", torch.bfloat16):
        out = onepass.attention(q, k, v)
    assert torch.equal(out, onepass.attention(*(x.bfloat16() for x in (q, k, v))))
    for causal, share in ((False, 1), (True, 2)):
        with FlopCounterMode(display=False) as counter:
            onepass.attention(q, k, v, causal=causal)
        assert counter.get_total_flops() == 2 * 2 * 4 * 5 * 9 * (16 + 24) // share
    ours, theirs = FlopCounterMode(display=False), FlopCounterMode(display=False)
    q, k, v = (x.requires_grad_() for x in inputs((2, 16, 16, 4, 4, 16, 16)))
    with ours:
        onepass.attention(q, k, v).sum().backward()
    with theirs, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).sum().backward()
    assert ours.get_total_flops() == theirs.get_total_flops() * 7 // 6  # the scores are computed twice


def test_bad_input_says_what_and_why():
    q, k, v = inputs((2, 5, 9, 4, 2, 16, 24))
    attention = onepass.attention
    for message, error, call in [
        (r"q has shape \(5, 4, 16\), expected \[B, S, H, D\]", ValueError, lambda: attention(q[0], k, v)),
        ("k is list, expected a tensor", TypeError, lambda: attention(q, [1], v)),
        ("v has dtype torch.int64, expected float32", TypeError, lambda: attention(q, k, v.long())),
        ("k has dtype torch.float16, expected that of q", TypeError, lambda: attention(q, k.half(), v)),
        (r"k has shape .* expected 2 in dim 0 \(the batch of q\)", ValueError, lambda: attention(q, k[:1], v)),
        (r"v has shape .* expected 9 in dim 1 \(the keys of k\)", ValueError, lambda: attention(q, k, v[:, :8])),
        ("k has head dim 8, expected that of q, 16", ValueError, lambda: attention(q, k[..., :8], v)),
        ("q has head dim 300, expected 1 to 256", ValueError, lambda: attention(*inputs((1, 1, 1, 1, 1, 300, 8)))),
        ("v has 1 heads, expected those of k, 2", ValueError, lambda: attention(q, k, v[:, :, :1])),
        ("q has 3 heads, expected a positive multiple of k's 2", ValueError, lambda: attention(q[:, :, :3], k, v)),
        (r"window=3: expected two ints", TypeError, lambda: attention(q, k, v, window=3)),
        (r"window=\(-2, 0\): expected -1", ValueError, lambda: attention(q, k, v, window=(-2, 0))),
        ("softcap=-1.0: expected 0", ValueError, lambda: attention(q, k, v, softcap=-1.0)),
        (
            r"alibi_slopes has shape \(3,\), expected \(4,\) or \(2, 4\)",
            ValueError,
            lambda: attention(q, k, v, alibi_slopes=torch.ones(3)),
        ),
        (r"sinks has shape \(2,\), expected \(4,\)", ValueError, lambda: attention(q, k, v, sinks=torch.ones(2))),
        (
            r"mask has shape \(9, 5\), expected one that broadcasts",
            ValueError,
            lambda: attention(q, k, v, mask=torch.ones(9, 5)),
        ),
        ("mask requires a gradient", ValueError, lambda: attention(q, k, v, mask=torch.ones(5, 9, requires_grad=True))),
        (
            r"out has shape \(2, 5, 4, 16\), expected \(2, 5, 4, 24\)",
            ValueError,
            lambda: attention(q, k, v, out=torch.empty_like(q)),
        ),
        (
            "backend='cpu' cannot take this call: dtype is torch.float64",
            ValueError,
            lambda: attention(q.double(), k.double(), v.double(), backend="cpu"),
        ),
        (
            r"lses has shape \(2, 1, 2, 3\), expected",
            ValueError,
            lambda: onepass.merge_attention(torch.ones(2, 1, 3, 4, 5), torch.ones(2, 1, 2, 3)),
        ),
    ]:
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize("case", [(2, 14, 67, 2, 2, 15, 15), (2, 256, 67, 1, 1, 2, 2), (2, 512, 150, 1, 1, 1, 1)])
def test_few_channels_are_as_good_as_torch(case):
    """Where PyTorch adds products in several short chains, one long chain breaks the rule."""
    for seed in range(20):
        b, sq, sk, h, hkv, d, dv = case
        q = randn(b, sq, h, d, seed=seed)
        k, v = randn(b, sk, hkv, d, seed=seed + 100), randn(b, sk, hkv, dv, seed=seed + 200)
        truth = onepass.attention(q.double(), k.double(), v.double(), backend="reference")
        assert_as_good_as_torch(onepass.attention(q, k, v, backend="cpu"), core(q, k, v)[0], truth)


def test_a_drawn_example_that_one_long_chain_breaks():
    q = randn(15, 3, 3, 15, seed=1).permute(1, 0, 2, 3)[1:, 1:, 1:]
    k = randn(3, 68, 2, 17, seed=2)[1:, 1:, 1:, 2:]
    v = randn(3, 68, 2, 15, seed=3)[1:, 1:, 1:]
    truth = onepass.attention(q.double(), k.double(), v.double(), backend="reference")
    assert_as_good_as_torch(onepass.attention(q, k, v, backend="cpu"), core(q, k, v)[0], truth)
