"""Triton's attention on the cases that the CPU's is held to: values, layouts bit by bit, poison, the interface."""

from __future__ import annotations

import itertools

import pytest
import torch

import onepass

from cases import ATTENTION, FLOATS
from helpers import INTERPRETED, TRITON, assert_as_good_as_torch
from test_attention import OPTIONS, in_float64, inputs, options
from test_attention_kvcache import LAYOUTS, Rows, append_writes_its_slots_alone
from test_attention_kvcache import OPTIONS as CACHE_OPTIONS
from test_attention_varlen import OPTIONS as RAGGED_OPTIONS
from test_attention_varlen import Ragged

pytestmark = [pytest.mark.parametrize("backend", [TRITON]), pytest.mark.usefixtures("on_its_device")]


def here(chosen: dict) -> dict:
    """Options with their tensors on the default device."""
    device = torch.get_default_device()
    return {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in chosen.items()}


def quick(case: tuple[int, ...]) -> bool:
    """Cheap enough for the interpreter: a program and a block of keys cost it milliseconds."""
    b, sq, sk, h, *_ = case
    return not INTERPRETED or b * h * max(1, sq // 16) * max(1, sk // 64) <= 40


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("case", "option"), [
    (case, option) for case, option in itertools.product(ATTENTION, OPTIONS)
    if quick(case) or (option == "many" and case[2] < 1000)
])
def test_as_good_as_torch(case, option, dtype, backend):
    if INTERPRETED and dtype == torch.float16:
        pytest.skip("interpreted, a program takes a millisecond: this combination runs on a GPU only")
    q, k, v = inputs(case, dtype)
    chosen = here(options(option, case))
    out, lse = onepass.attention(q, k, v, return_lse=True, backend=backend, **chosen)
    same, same_lse = onepass.attention(q, k, v, return_lse=True, backend="reference", **chosen)
    truth, true_lse = onepass.attention(
        q.double(), k.double(), v.double(), return_lse=True, backend="reference", **in_float64(chosen)
    )
    tolerance = {torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    assert out.dtype == dtype and lse.dtype == torch.float32
    if truth.numel():
        torch.testing.assert_close(out.double(), truth, rtol=0, atol=tolerance * float(truth.abs().max()))
        torch.testing.assert_close(lse.double(), true_lse, rtol=1e-6, atol=5e-6)
        assert_as_good_as_torch(lse, same_lse, true_lse, "lse") if dtype == torch.float32 else None
    assert same.shape == out.shape


@pytest.mark.parametrize(("layout", "option"), [
    (layout, option) for layout, option in itertools.product(LAYOUTS, CACHE_OPTIONS)
    if layout in (LAYOUTS[0], LAYOUTS[-1]) or option in ("rotary", "many")
])
def test_cache_matches_the_reference(layout, option, backend):
    chosen = here(CACHE_OPTIONS[option])
    tolerances = {torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}
    for dtype, tolerance in list(tolerances.items())[: 2 if INTERPRETED else 3]:
        rows = Rows((0, 5, 150), dtype=dtype)
        truth = rows.double().call(layout=layout, backend="reference", **chosen)
        for ragged in (False, True):
            out, lse = rows.call(layout=layout, ragged=ragged, backend=backend, **chosen)
            torch.testing.assert_close(out.double(), truth[0], rtol=0, atol=tolerance * float(truth[0].abs().max()))
            torch.testing.assert_close(lse.double(), truth[1], rtol=0, atol=tolerance * 5)


@pytest.mark.parametrize(("new", "heads", "kv_heads"), [(1, 4, 1), (3, 3, 3), (9, 8, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layout_and_batch_do_not_change_a_bit(new, heads, kv_heads, dtype, backend):
    """Several splits of the longest row; the capacity is the same for each row, alone and in the batch."""
    rows = Rows((0, 130, 300 if INTERPRETED else 700), new, heads, kv_heads, 32, 32, dtype)
    truth = rows.call(causal=True, backend=backend)
    for layout in LAYOUTS if not INTERPRETED else LAYOUTS[2:6:2] + LAYOUTS[-1:]:
        assert all(map(torch.equal, rows.call(layout=layout, causal=True, backend=backend), truth)), layout
    assert all(map(torch.equal, rows.call(ragged=True, causal=True, backend=backend), truth))
    assert all(map(torch.equal, rows.call(causal=True, backend=backend), truth))
    for b in range(3):
        out, lse = rows.only(b).call(causal=True, backend=backend)
        assert torch.equal(out[0], truth[0][b])
        assert torch.equal(lse[0], truth[1][b])


def test_other_rows_of_a_ragged_batch_do_not_change_a_bit(backend):
    """Alone, a row of one query is what decides; beside a long one the launch is another."""
    for dtype in (torch.float32, torch.bfloat16):
        case = Ragged(((1, 300), (40, 70), (9, 300), (0, 5), (1, 0), (3, 20)), dtype=dtype)
        case.cu_q, case.cu_k = (x.to(case.q.device) for x in (case.cu_q, case.cu_k))
        chosen = {"causal": True, "sinks": here(RAGGED_OPTIONS["sinks"])["sinks"]}
        out, lse = case.call(backend=backend, **chosen)
        for b in range(case.batch):
            at = slice(int(case.cu_q[b]), int(case.cu_q[b + 1]))
            alone = case.alone(b, return_lse=True, backend=backend, **chosen)
            assert torch.equal(alone[0][0], out[at]) and torch.equal(alone[1][0], lse[:, at]), b
        for size in (7,) if INTERPRETED else (1, 7):
            k, v, table = case.pages(size)
            paged = onepass.attention_varlen(case.q, k, v, *case.lengths(), block_table=table.to(k.device),
                                             return_lse=True, backend=backend, **chosen)
            assert torch.equal(paged[0], out) and torch.equal(paged[1], lse), size


@pytest.mark.parametrize("option", RAGGED_OPTIONS)
def test_ragged_rows_as_good_as_torch(option, backend):
    chosen = here(RAGGED_OPTIONS[option])
    for dtype, tolerance in ((torch.float32, 3e-6), (torch.bfloat16, 2e-2)):
        case = Ragged(((1, 300), (5, 3), (0, 9), (2, 0), (20, 40)), dtype=dtype)
        case.cu_q, case.cu_k = (x.to(case.q.device) for x in (case.cu_q, case.cu_k))
        out, lse = case.call(backend=backend, **chosen)
        wide = (x.double() for x in case.tensors())
        truth, true_lse = onepass.attention_varlen(
            *wide, *case.lengths(), return_lse=True, backend="reference", **in_float64(chosen)
        )
        torch.testing.assert_close(out.double(), truth, rtol=0, atol=tolerance * float(truth.abs().max()))
        torch.testing.assert_close(lse.double(), true_lse, rtol=1e-6, atol=5e-6)


def test_append_writes_these_slots_and_no_other(backend):
    append_writes_its_slots_alone(backend)


def test_nan_shows_where_it_is_and_nowhere_else(backend):
    q, k, v = inputs((2, 5, 40, 4, 2, 16, 16))
    clean = onepass.attention(q, k, v, causal=True, backend=backend)
    q[1, 2, 3] = torch.nan
    out = onepass.attention(q, k, v, causal=True, backend=backend)
    assert out[1, 2, 3].isnan().all()
    out[1, 2, 3] = clean[1, 2, 3]
    assert torch.equal(out, clean)


def test_out_and_gradients(backend):
    q, k, v = inputs((2, 9, 21, 4, 2, 16, 24))
    expected = onepass.attention(q, k, v, causal=True, backend=backend)
    wide = torch.full((2, 9, 4, 30), torch.nan)
    for out in (torch.empty(2, 9, 4, 24), wide[..., 3:27]):
        assert torch.equal(onepass.attention(q, k, v, causal=True, out=out, backend=backend), expected)
        assert torch.equal(out, expected)
    assert wide[..., :3].isnan().all() and wide[..., 27:].isnan().all()
    found = []
    for name in (backend, "reference"):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out, lse = onepass.attention(*leaves, causal=True, return_lse=True, backend=name)
        found.append(torch.autograd.grad((out * 0.5).sum() + lse.sum(), leaves))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_library_op(backend):
    q, k, v = (x.requires_grad_() for x in inputs((2, 3, 7, 4, 2, 8, 8)))
    torch.library.opcheck(
        torch.ops.onepass.attention_forward.default, (q, k, v, True, -1, -1, 0.0, 0.3, None, None, None),
        {"backend": backend},
    )


def test_what_it_refuses(backend):
    cache = torch.zeros(1, 4, 1, 32)[..., ::2]
    with pytest.raises(ValueError, match="stride 2 in the head dim, the kernel takes 1"):
        onepass.attention_with_kvcache(torch.zeros(1, 1, 1, 16), cache, cache, cache_seqlens=2, backend=backend)
