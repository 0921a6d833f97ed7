"""The join of partial attention: kernels, gradients, empty parts, bits."""
from __future__ import annotations

import warnings

import pytest
import torch
from torch.nn.functional import pad

import onepass
from onepass.reference import attention as reference

from cases import FLOATS, MERGES
from helpers import ALL_BACKENDS, INTERPRETED, ISAS, KERNELS, assert_as_good_as_torch, run_python

pytestmark = pytest.mark.usefixtures("on_its_device")

INF = float("inf")


def randn(*shape, seed=0, dtype=torch.float32):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), device="cpu")
    return x.to(torch.get_default_device(), dtype)


def parts(case, dtype=torch.float32):
    """outs, lses and sinks, one part in four without a key: its out is NaN."""
    n, *leading, length, heads, _ = case
    outs = randn(*case, seed=1, dtype=dtype)
    lses = 3 * randn(n, *leading, heads, length, seed=2)
    empty = randn(*lses.shape, seed=3) > 0.7
    lses[empty] = -INF
    outs[empty.transpose(-1, -2)] = float("nan")
    return outs, lses, randn(heads, seed=4)


def left_to_a_gpu(case, dtype, backend):
    """What the interpreter, at milliseconds a program, need not run too."""
    if INTERPRETED and backend == "triton" and (70 in case or dtype == torch.float16 or (
        case[0] > 4 and dtype != torch.float32
    )):
        pytest.skip("interpreted, a program takes a millisecond: this combination runs on a GPU only")


def torchs_own(outs, lses, sinks=None):
    """In the dtype of outs, as one would write it."""
    lse = lses if sinks is None else torch.cat([lses, sinks[:, None].expand(lses.shape[1:])[None]])
    lse = lse.logsumexp(0)
    weights = (lses - torch.where(lse == -INF, 0, lse)).exp().transpose(-1, -2)[..., None].to(outs.dtype)
    return (weights * torch.where(weights > 0, outs, 0)).sum(0), lse


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("case", MERGES, ids=str)
@pytest.mark.parametrize("with_sinks", [False, True])
def test_is_as_good_as_torch(case, with_sinks, backend, dtype):
    left_to_a_gpu(case, dtype, backend)
    outs, lses, sinks = parts(case, dtype)
    sinks = sinks if with_sinks else None
    truth = reference.merge_attention(outs.double(), lses.double(), None if sinks is None else sinks.double())
    own = torchs_own(outs, lses, sinks)
    out, lse = onepass.merge_attention(outs, lses, sinks=sinks, backend=backend)
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert_as_good_as_torch(out, own[0], truth[0], "out")
    assert_as_good_as_torch(lse, own[1], truth[1], "lse")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("case", MERGES, ids=str)
@pytest.mark.parametrize("with_sinks", [False, True])
def test_gradients_are_as_good_as_torchs(case, with_sinks, backend, dtype):
    left_to_a_gpu(case, dtype, backend)

    def gradients(merge, kind, lse_kind):
        outs, lses, sinks = parts(case, dtype)
        leaves = [outs.to(kind), lses.to(lse_kind), *([sinks.to(lse_kind)] if with_sinks else [])]
        leaves = [x.requires_grad_() for x in leaves]
        out, lse = merge(*leaves)
        on_out, on_lse = randn(*out.shape, seed=5, dtype=dtype), randn(*lse.shape, seed=6)
        total = (out * on_out.to(out.dtype)).sum() + (torch.where(lse.isfinite(), lse, 0) * on_lse.to(lse.dtype)).sum()
        return torch.autograd.grad(total, leaves)

    merge = lambda outs, lses, sinks=None: onepass.merge_attention(outs, lses, sinks=sinks, backend=backend)
    got = gradients(merge, dtype, torch.float32)
    own = gradients(reference.merge_attention, dtype, torch.float32)
    truth = gradients(reference.merge_attention, torch.float64, torch.float64)
    for name, a, b, c in zip(("outs", "lses", "sinks"), got, own, truth, strict=False):
        assert_as_good_as_torch(a, b.nan_to_num(), c.nan_to_num(), name)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_nothing_to_attend(backend):
    outs, lses, sinks = parts((3, 2, 4, 2, 8))
    outs, lses = torch.full_like(outs, float("nan")).requires_grad_(), torch.full_like(lses, -INF).requires_grad_()
    out, lse = onepass.merge_attention(outs, lses, backend=backend)
    assert (out == 0).all() and (lse == -INF).all()
    out.sum().backward()
    assert (outs.grad == 0).all() and (lses.grad == 0).all()
    out, lse = onepass.merge_attention(outs, lses, sinks=sinks, backend=backend)
    assert (out == 0).all() and torch.equal(lse, sinks[:, None].expand(2, 2, 4))


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("case", [(5, 3, 7, 4, 40), (70, 3, 1, 2, 16)], ids=str)
def test_a_row_has_the_bits_that_it_has_alone(case, backend):
    outs, lses, sinks = parts(case)
    leaves = outs.nan_to_num().requires_grad_(), lses.requires_grad_()

    def run(chosen):
        taken = [x[:, chosen] for x in leaves]
        out, lse = onepass.merge_attention(*taken, sinks=sinks, backend=backend)
        grads = torch.autograd.grad(out.square().sum() + lse[lse.isfinite()].sum(), leaves)
        return [out, lse, *(g[:, chosen].transpose(0, 1) for g in grads)]

    before = torch.get_num_threads()
    try:
        whole = run(slice(0, 3))
        for threads in (1, 2, 3) if backend == "cpu" else (1,):
            torch.set_num_threads(threads)
            assert all(map(torch.equal, run(slice(0, 3)), whole))
            for b in range(3):
                assert all(torch.equal(x, y[b : b + 1]) for x, y in zip(run(slice(b, b + 1)), whole, strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_layouts(backend):
    """A kernel gives the same bits for each: rows with gaps, and that start where no wide load can, too."""
    outs, lses, sinks = parts((3, 2, 5, 4, 24))
    truth = onepass.merge_attention(outs, lses, sinks=sinks, backend=backend)
    for views in (
        (outs.transpose(2, 3).contiguous().transpose(2, 3), lses.transpose(-1, -2).contiguous().transpose(-1, -2)),
        (outs.movedim(0, 2).contiguous().movedim(2, 0), lses.movedim(0, 3).contiguous().movedim(3, 0)),
        (outs.mT.contiguous().mT, lses),
        (pad(outs, (3, 6))[..., 3:-6], pad(lses, (1, 2))[..., 1:-2]),
        (pad(outs, (0, 9))[..., :-9], lses),
        (list(outs), list(lses)),
        (torch.cat([outs, outs])[3:], torch.cat([lses, lses])[3:]),
    ):
        out, lse = onepass.merge_attention(*views, sinks=sinks, backend=backend)
        if backend == "reference":
            torch.testing.assert_close((out, lse), truth, rtol=2e-6, atol=2e-6)
        else:
            assert torch.equal(out, truth[0]) and torch.equal(lse, truth[1])
    turned = onepass.merge_attention(outs.roll(1, 0), lses.roll(1, 0), sinks=sinks, backend=backend)
    torch.testing.assert_close(turned, truth, rtol=2e-6, atol=2e-6)
    shared = outs[:, :1].expand(outs.shape), lses[:, :1].expand(lses.shape)
    out, lse = onepass.merge_attention(*shared, backend=backend)
    assert torch.equal(out[0], out[1]) and torch.equal(lse[0], lse[1])


def test_joined_chunks_are_attention_over_all_keys():
    q, k, v = randn(2, 4, 8, 16, seed=1), randn(2, 300, 2, 16, seed=2), randn(2, 300, 2, 16, seed=3)
    sinks = randn(8, seed=4)
    whole = onepass.attention(q, k, v, sinks=sinks, return_lse=True)
    pieces = [onepass.attention(q, k[:, a:b], v[:, a:b], return_lse=True) for a, b in ((0, 7), (7, 7), (7, 300))]
    with warnings.catch_warnings():
        warnings.simplefilter("error")          # no fallback
        merged = onepass.merge_attention([o for o, _ in pieces], [x for _, x in pieces], sinks=sinks)
    torch.testing.assert_close(merged, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa):
    code = f"""
import sys; sys.path.insert(0, {__file__.rsplit("/", 1)[0]!r})
import torch, onepass, test_attention_merge as t
assert onepass._native._C.isa == {isa!r}
for case in t.MERGES:
    for dtype in t.FLOATS:
        for with_sinks in (False, True):
            t.test_is_as_good_as_torch(case, with_sinks, "cpu", dtype)
            t.test_gradients_are_as_good_as_torchs(case, with_sinks, "cpu", dtype)
"""
    run_python(code, ONEPASS_CPU_ISA=isa)
