"""Attention over quantized caches: values against the reference, layouts, poison, traces, errors."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import onepass
from onepass import registry
from onepass.integrations import flash_attn_3
from onepass.reference import kvcache as reference

from cases import FLOATS
from helpers import BACKENDS, ISAS, assert_as_good_as_torch, run_python
from quantized_rows import CODES, E4M3, INT8, ROTARY, Rows, dequantized, randn, raw

TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}
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
KINDS = (
    ("token", "token"), ("head", "head"), ("head", "token"), ("token", "head"), ("none", "none"), ("none", "token"),
)  # fmt: skip


def kinds_of(codes):
    return [kinds for kinds in KINDS if codes == E4M3 or "none" not in kinds]


def assert_near(got, truth, dtype):
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(got[0].double(), truth[0], rtol=0, atol=tolerance * float(truth[0].abs().max()))
    torch.testing.assert_close(got[1].double(), truth[1], rtol=0, atol=tolerance * 5)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("codes", CODES, ids=str)
def test_matches_the_dequantized_cache(codes, option):
    for dtype, kinds in itertools.product(FLOATS, kinds_of(codes)):
        for new, dim, value_dim in ((3, 32, 40), (1, 33, 17), (11, 64, 64)):
            if new != 3 and option == "tree":
                continue
            rows = Rows(new=new, dim=dim, value_dim=value_dim, dtype=dtype, codes=codes, kinds=kinds)
            truth = rows.truth(**OPTIONS[option])
            for backend in BACKENDS[:1] + ["cpu"]:
                assert_near(rows.call(backend=backend, **OPTIONS[option]), truth, dtype)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("codes", CODES, ids=str)
def test_every_layout_of_the_reference(codes, layout):
    options = {} if layout.get("leftpad") else OPTIONS["rotary"]
    for kinds, ragged in itertools.product(kinds_of(codes), (False, True)):
        rows = Rows(codes=codes, kinds=kinds)
        for backend in ("cpu", "reference"):
            got = rows.call(ragged, layout, backend, **options)
            assert_near(got, rows.truth(**options), torch.float32)


@pytest.mark.parametrize("sizes", [(1, 4, 1), (1, 8, 2), (1, 3, 3), (4, 8, 2), (9, 8, 2), (40, 4, 2)], ids=str)
@pytest.mark.parametrize("codes", CODES, ids=str)
def test_layout_batch_and_threads_do_not_change_a_bit(codes, sizes):
    new, heads, kv_heads = sizes
    for dtype, kinds in zip(FLOATS, (("token", "token"), ("head", "token"), ("token", "head")), strict=True):
        rows = Rows((0, 130, 700, 1500), new, heads, kv_heads, 64, 64, dtype, codes, kinds)
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


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_shape(data):
    number = lambda low, high: data.draw(st.integers(low, high))
    codes, dtype = data.draw(st.sampled_from(CODES)), data.draw(st.sampled_from(FLOATS))
    kv_heads = number(1, 3)
    rows = Rows(
        tuple(number(0, 200) for _ in range(number(1, 3))), number(1, 20), kv_heads * number(1, 5), kv_heads,
        number(1, 256), number(1, 256), dtype, codes, data.draw(st.sampled_from(kinds_of(codes))),
    )  # fmt: skip
    got = rows.call(data.draw(st.booleans()), {"page": number(1, 20)}, "cpu", causal=True)
    assert_near(got, rows.truth(causal=True), dtype)


@pytest.mark.parametrize("codes", CODES, ids=str)
def test_error_of_decoding_is_that_of_torch(codes):
    for dtype, new in itertools.product(FLOATS, (1, 12)):
        rows = Rows((4000,), new, 8, 2, 128, 128, dtype, codes, ("token", "token"))
        caches, scales, kwargs = rows.layout()
        seqlens = kwargs["cache_seqlens"]
        reference.kvcache_append(*caches, *rows.tokens, seqlens, k_token_scale=scales[0], v_token_scale=scales[1])
        k, v = (
            dequantized(c, s)[:, : 4000 + new].to(dtype).repeat_interleave(4, 2).transpose(1, 2)
            for c, s in zip(caches, scales, strict=True)
        )
        same = (((rows.q.transpose(1, 2) @ k.mT) * 128**-0.5).softmax(-1) @ v).transpose(1, 2)
        assert_as_good_as_torch(rows.call(backend="cpu")[0], same, rows.truth()[0])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("codes", CODES, ids=str)
def test_nan_that_is_seen_shows(codes, backend):
    rows = Rows((5, 9), codes=codes, kinds=("token", "token"))
    rows.tokens[0][1, 0, 1, 3] = torch.nan
    out, lse = rows.call(backend=backend)
    assert out[0].isfinite().all() and lse[0].isfinite().all()
    assert lse[1, 2:].isnan().all() and lse[1, :2].isfinite().all()
    if codes == E4M3:
        rows = Rows((5, 9), codes=codes, kinds=("none", "none"))
        raw(rows.parts[0][2][1][0])[4, 0, 2] = 0xFF
        lse = rows.call(backend=backend)[1]
        assert lse[1, :2].isnan().all() and lse[0].isfinite().all() and lse[1, 2:].isfinite().all()


# ---- instruction sets, tracing, errors, integrations ----


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa):
    code = """
import itertools
from test_attention_quantized import *
torch.set_num_threads(1)
for codes, dtype, option, new in itertools.product(CODES, FLOATS, ("none", "rotary", "many"), (1, 3, 30)):
    for dim in (40, 129):
        rows = Rows(new=new, dim=dim, value_dim=dim - 3, dtype=dtype, codes=codes)
        assert_near(rows.call(backend="cpu", **OPTIONS[option]), rows.truth(**OPTIONS[option]), dtype)
"""
    run_python(f"import sys; sys.path.insert(0, {__file__.rsplit('/', 1)[0]!r})\n" + code, ONEPASS_CPU_ISA=isa)


@pytest.mark.parametrize("kind", ["head", "token"])
@pytest.mark.parametrize("codes", CODES, ids=str)
def test_a_compiled_step_copies_no_cache(codes, kind):
    from torch._inductor.utils import run_and_get_code

    def step(q, k_cache, v_cache, k, v, seqlens, k_scale, v_scale):
        return onepass.attention_with_kvcache(
            q * 2, k_cache, v_cache, k, v, cache_seqlens=seqlens, causal=True, k_scale=k_scale, v_scale=v_scale
        )

    q, k, v = randn(2, 1, 4, 16, seed=1), randn(2, 1, 2, 16, seed=2), randn(2, 1, 2, 16, seed=3)
    seqlens = torch.tensor([3, 76], dtype=torch.int32)
    scale = torch.tensor(0.02).expand(2, 2) if kind == "head" else torch.zeros(2, 77, 2)
    twins = [[torch.zeros(2, 77, 2, 16, dtype=codes) for _ in "kv"] for _ in "ab"]
    scales = [[scale if kind == "head" else scale.clone() for _ in "kv"] for _ in "ab"]
    compiled = torch.compile(step, fullgraph=True)
    out, (code,) = run_and_get_code(compiled, q, *twins[0], k, v, seqlens, *scales[0])
    assert torch.equal(out, step(q, *twins[1], k, v, seqlens, *scales[1]))
    assert all(torch.equal(raw(a), raw(b)) for a, b in zip(*twins, strict=True)) and raw(twins[0][0]).any()
    assert all(map(torch.equal, *scales))
    assert not any("77" in line and ("empty_strided" in line or "copy_" in line) for line in code.splitlines()), code
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled(q, *twins[0], k, v, seqlens - 1, *scales[0])


@pytest.mark.parametrize("kind", ["head", "token"])
@pytest.mark.parametrize("codes", CODES, ids=str)
def test_traces(codes, kind):
    rows = Rows(lengths=(4, 9), codes=codes, kinds=(kind, kind))
    caches, scales, kwargs = rows.layout(page=4)
    caches = [torch.zeros_like(x) for x in caches]
    scales = [x.nan_to_num(1) for x in scales]  # opcheck compares with ==
    per_head, per_token = (scales, [None] * 2) if kind == "head" else ([None] * 2, scales)
    place = (kwargs["cache_seqlens"], kwargs["block_table"])
    # PyTorch compares no two tensors of float8, which opcheck's test of the schema needs.
    tests = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    tests += ["test_schema"] if codes == INT8 else []
    torch.library.opcheck(
        torch.ops.onepass.kvcache_append.default,
        (*caches, *rows.tokens, *place, *(None,) * 3, 3, None, None, True, *per_head, *per_token),
        test_utils=tests,
    )
    args = (rows.q, *caches, place[0], 0, place[1], None, None, None, 3, None, None, True, True, -1, -1, 0.0, 0.3)
    attend = torch.ops.onepass.kvcache_attention.default
    torch.library.opcheck(attend, (*args, None, None, None, *scales), test_utils=tests)
    with torch.autocast("cpu", torch.bfloat16):
        out = onepass.attention_with_kvcache(rows.q, *caches, k_scale=scales[0], v_scale=scales[1], **kwargs)
        assert out.dtype == torch.bfloat16


def test_bad_input_writes_nothing():
    good = Rows((2, 9), codes=INT8, kinds=("token", "token"))
    caches, scales, kwargs = good.layout()
    k_scale, v_scale = scales
    before = [x.clone() for x in (*caches, *scales)]
    floats = [x.float() for x in caches]
    fp8 = [x.to(E4M3) for x in caches]
    call = lambda caches, **options: onepass.attention_with_kvcache(
        good.q, *caches, *good.tokens, **(kwargs | {"k_scale": k_scale, "v_scale": v_scale} | options)
    )
    bad = [
        ("k_scale is None with a cache of int8", caches, {"k_scale": None}),
        ("v_scale is None with a cache of int8", caches, {"v_scale": None}),
        ("k_scale is given with a cache of torch.float32", floats, {}),
        ("v_scale is given with a cache of torch.float32", floats, {"k_scale": None}),
        ("v_cache has dtype torch.float8_e4m3fn, expected that of k_cache, torch.int8", (caches[0], fp8[0]), {}),
        ("v_cache has dtype torch.float32, expected that of k_cache, torch.int8", (caches[0], floats[0]), {}),
        ("k_cache has dtype torch.uint8", [x.view(torch.uint8) for x in caches], {}),
        ("k_cache has dtype torch.float8_e5m2", [x.view(torch.float8_e5m2) for x in caches], {}),
        ("k_scale has dtype torch.float64, expected float32", caches, {"k_scale": k_scale.double()}),
        (r"v_scale has shape \(2, 3\), expected float32 \[B, Hkv\] = \(2, 2\), or \(2, 19, 2\)", caches,
         {"v_scale": torch.ones(2, 3)}),
        ("k_scale is float, expected float32", caches, {"k_scale": 0.1}),
        ("v_scale is k_scale: the append writes both", caches, {"v_scale": k_scale}),
        ("k_scale requires a gradient", caches, {"k_scale": torch.ones(2, 2, requires_grad=True)}),
        (r"cache_seqlens\[1\]=30 with 3 new keys", caches, {"cache_seqlens": torch.tensor([2, 30], dtype=torch.int32)}),
    ]  # fmt: skip
    for backend, (message, given_caches, options) in itertools.product(("cpu", "reference", None), bad):
        with pytest.raises((ValueError, TypeError), match=message):
            call(given_caches, backend=backend, **options)
    for backend in ("triton", "cuda"):
        for op in ("kvcache_append", "kvcache_attention"):
            args = (*caches, *good.tokens) if op == "kvcache_append" else (good.q, *caches)
            assert "it takes no cache of torch.int8 yet" in str(registry.refusal(registry.OPS[op], backend, args))
        with pytest.raises(ValueError, match=r"takes no cache of torch\.int8 yet"):
            call(caches, backend=backend)
    for now, then in zip((*caches, *scales), before, strict=True):
        assert torch.equal(raw(now), raw(then))
    call(caches)
    assert not torch.equal(raw(caches[0]), raw(before[0])) and not torch.equal(raw(k_scale), raw(before[2]))


def test_flash_attn_3_takes_descale():
    rows = Rows((5, 9), codes=E4M3, kinds=("head", "head"))
    (k_cache, v_cache), (k_scale, v_scale), kwargs = rows.layout(page=4)
    twins = k_cache.clone(), v_cache.clone()
    out, lse = flash_attn_3.flash_attn_with_kvcache(
        rows.q, *twins, *rows.tokens, cache_seqlens=kwargs["cache_seqlens"], page_table=kwargs["block_table"],
        k_descale=k_scale, v_descale=v_scale, causal=True, return_softmax_lse=True,
    )  # fmt: skip
    ours = onepass.attention_with_kvcache(
        rows.q, k_cache, v_cache, *rows.tokens, k_scale=k_scale, v_scale=v_scale, causal=True, return_lse=True, **kwargs
    )
    assert torch.equal(out, ours[0]) and torch.equal(lse, ours[1]) and torch.equal(raw(twins[0]), raw(k_cache))
    with pytest.raises(ValueError, match="q_descale"):
        flash_attn_3.flash_attn_with_kvcache(rows.q, k_cache, v_cache, q_descale=k_scale, k_descale=k_scale)
