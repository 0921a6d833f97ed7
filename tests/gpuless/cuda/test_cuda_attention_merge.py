"""The join of partial attention in CUDA: each number of lanes a row, parts past the lanes, wide and narrow rows."""
from __future__ import annotations

import pytest
import torch

import onepass
from onepass.reference import attention as reference

import cases
from helpers import assert_as_good_as_torch
from test_attention_merge import parts, randn

# (parts, B, S, H, D): rows of 8, 16 and 32 lanes and past them, in 16 bytes and one by one; to a lane one part or many
CASES = (
    (3, 1, 5, 3, 32), (9, 2, 1, 3, 33), (20, 1, 3, 2, 64), (33, 1, 2, 2, 128), (70, 1, 1, 3, 132), (5, 1, 2, 2, 301),
)


def run(outs, lses, sinks, on_out, on_lse, device, backend="cuda"):
    leaves = [x.to(device).detach().requires_grad_() for x in (outs, lses, sinks)]
    out, lse = onepass.merge_attention(*leaves[:2], sinks=leaves[2], backend=backend)
    total = (out * on_out.to(device, out.dtype)).sum() + (lse * on_lse.to(device, lse.dtype)).sum()
    return [x.detach().cpu() for x in (out, lse, *torch.autograd.grad(total, leaves))]


def operands(case, dtype=torch.float32):
    """One part in four saw no key and its out is NaN; the sinks keep every LSE finite."""
    outs, lses, sinks = parts(case, dtype)
    return outs, lses, sinks, randn(*case[1:], seed=5, dtype=dtype), randn(*lses.shape[1:], seed=6)


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(case, dtype, device):
    given = operands(case, dtype)
    got = run(*given, device)
    assert all(map(torch.equal, got, run(*given, device)))
    own = run(*given, device, "reference")
    truth = run(*(x.double() for x in given), "cpu", "reference")
    for name, a, b, c in zip(("out", "lse", "outs", "lses", "sinks"), got, own, truth, strict=True):
        assert_as_good_as_torch(a, b.nan_to_num(), c.nan_to_num(), name)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_layouts_change_no_bit(case, device):
    """Rows that start on odd addresses, gaps between rows, one LSE for all heads: what is read one by one has the bits
    of what is read in 16 bytes."""
    outs, lses, *rest = operands(case)
    outs, lses = outs.nan_to_num().to(device), lses[:, :, :1].to(device).expand(lses.shape)
    whole = run(outs, lses, *rest, device)
    padded = torch.full((*case[:-1], case[-1] + 9), torch.nan, device=device)
    for first in (0, 1, 4):
        view = padded[..., first : first + case[-1]]
        view.copy_(outs)
        assert all(map(torch.equal, run(view, lses, *rest, device), whole))
    heads_first = outs.transpose(2, 3).contiguous().transpose(2, 3)
    assert all(map(torch.equal, run(heads_first, lses.contiguous(), *rest, device), whole))


def test_a_row_does_not_depend_on_its_neighbours(device):
    """Nor on its place in a warp."""
    for case in ((5, 5, 3, 2, 16), (40, 3, 2, 2, 70)):
        outs, lses, sinks, on_out, on_lse = operands(case)
        whole = run(outs, lses, sinks, on_out, on_lse, device)
        for b in range(case[1]):
            row = slice(b, b + 1)
            alone = run(outs[:, row], lses[:, row], sinks, on_out[row], on_lse[row], device)
            assert all(torch.equal(x, y[row]) for x, y in zip(alone[:2], whole[:2], strict=True))
            assert all(torch.equal(x, y[:, row]) for x, y in zip(alone[2:4], whole[2:4], strict=True))


def test_parts_without_keys(device):
    """All of them: zeros, and an LSE of -inf; but for one: that one's bits, whatever lies in the others."""
    outs, lses, sinks, on_out, on_lse = operands((40, 2, 3, 2, 20))
    outs[:], lses[:] = torch.nan, -torch.inf
    sinks[:] = -torch.inf
    out, lse, douts, dlses, dsinks = run(outs, lses, sinks, on_out, on_lse, device)
    assert (out == 0).all() and (lse == -torch.inf).all()
    assert (douts == 0).all() and (dlses == 0).all() and (dsinks == 0).all()
    outs[33], lses[33] = randn(*outs.shape[1:], seed=7), 2.5
    out, lse, douts, dlses, dsinks = run(outs, lses, sinks, on_out, on_lse, device)
    assert torch.equal(out, outs[33]) and (lse == 2.5).all() and (dsinks == 0).all()
    assert torch.equal(douts[33], on_out) and (douts[:33] == 0).all() and (douts[34:] == 0).all()
    torch.testing.assert_close(dlses[33], on_lse, rtol=1e-5, atol=1e-5)


def test_more_rows_than_a_block_and_no_rows(device):
    for rows in (0, 1, 15, 16, 17, 67):
        given = operands((2, rows, 1, 1, 12))
        out, lse, douts, dlses, _ = run(*given, device)
        want = reference.merge_attention(*(x.double() for x in given[:3]))
        torch.testing.assert_close((out.double(), lse.double()), want, rtol=1e-5, atol=1e-5)
        assert douts.shape == given[0].shape and dlses.shape == given[1].shape
