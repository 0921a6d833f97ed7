"""The Gumbel softmax in CUDA: rows of a warp, of a block, of a wide one, and longer than shared memory."""
from __future__ import annotations

import math

import pytest
import torch

import onepass

import cases
from helpers import assert_as_good_as_torch

TAG = 6 << 56
# The first and the last of each kind; 12285 floats fit twice (backward), 24573 once.
LENGTHS = (1, 3, 45, 512, 513, 4095, 4096, 12285, 12290, 24573, 24580)


def noise(shape, seed=3):
    return onepass.rng.gumbel(shape, seed=seed, stream=TAG, dtype=torch.float32, backend="reference")


@pytest.mark.parametrize("dtype", cases.FLOATS)
@pytest.mark.parametrize("n", LENGTHS)
def test_values_and_gradients(n, dtype, device):
    """Few numbers are luck, so short rows are many: all but the first begin inside a block of four."""
    shape = (2 + 2000 // n, n)
    g = torch.Generator().manual_seed(0)
    logits, on = (torch.randn(shape, generator=g).to(dtype) for _ in range(2))

    def plain(where, wide):
        x = logits.to(where, wide).requires_grad_()
        y = ((x + noise(shape).to(where, wide)) / 0.4).softmax(-1)
        return y.detach().cpu(), torch.autograd.grad(y, x, on.to(where, wide))[0].cpu()

    def own():
        x = logits.to(device).requires_grad_()
        y = onepass.gumbel_softmax(x, 0.4, seed=3, backend="cuda")
        return y.detach().cpu(), torch.autograd.grad(y, x, on.to(device))[0].cpu()

    got = own()
    assert all(map(torch.equal, got, own()))
    for name, a, b, c in zip(("sample", "gradient"), got, plain(device, dtype), plain("cpu", torch.float64),
                             strict=True):
        assert a.dtype == dtype
        assert_as_good_as_torch(a, b, c, name)


@pytest.mark.parametrize("dtype", cases.FLOATS)
@pytest.mark.parametrize("n", LENGTHS)
def test_hard_takes_the_largest_of_the_references_bits(n, dtype, device):
    shape = (3, n)
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    for seed in (3, torch.tensor([5, -1, 2**40])):
        there = seed.to(device) if isinstance(seed, torch.Tensor) else seed
        hard = onepass.gumbel_softmax(logits.to(device), 0.5, hard=True, seed=there, backend="cuda").cpu()
        wanted = (logits.float() + noise(shape, seed)).argmax(-1, keepdim=True)
        assert torch.equal(hard, torch.zeros(shape, dtype=dtype).scatter_(-1, wanted, 1.0))


@pytest.mark.parametrize("n", [40, 600, 5000, 24580])
def test_of_equals_the_first_is_taken(n, device):
    """Logits that undo their noise: all that are left are the largest, in lanes, warps and trips of their own."""
    logits, first = -noise((4, n)), [0, 1, n // 2, n - 9]
    for row, begin in enumerate(first):
        logits[row, :begin] = -math.inf
    hard = onepass.gumbel_softmax(logits.to(device), hard=True, seed=3, backend="cuda").cpu()
    assert torch.equal(hard, torch.zeros(4, n).scatter_(1, torch.tensor(first)[:, None], 1.0))


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("n", [40, 600, 5000, 24580])
def test_bad_logits_go_where_the_reference_sends_them(n, hard, device):
    inf, nan = math.inf, math.nan
    rows = torch.zeros(6, n)
    rows[0, 1:] = -inf                      # one category is left
    rows[1] = -inf
    rows[2, n // 2] = inf
    rows[3, n - 1] = nan
    rows[4, :-1] = nan                      # whole packs, and whole threads
    rows[5, : n // 3] = -inf
    got = onepass.gumbel_softmax(rows.to(device), hard=hard, seed=3, backend="cuda").cpu()
    want = onepass.gumbel_softmax(rows, hard=hard, seed=3, backend="reference")
    torch.testing.assert_close(got, want, equal_nan=True)
    assert (want[1:5].isnan().all() or hard) and want[0, 0] == 1


def test_views_are_read_and_nothing_else_is_written(device):
    base = torch.randn(3, 5, 1300, generator=torch.Generator().manual_seed(3))
    for dtype in cases.FLOATS:
        logits = base.to(device, dtype)[1, :, 3:1290]
        out = torch.full((5, 1300), torch.nan, dtype=dtype, device=device)
        got = onepass.gumbel_softmax(logits, seed=3, out=out[:, 7:1294], backend="cuda")
        assert torch.equal(got, onepass.gumbel_softmax(logits.contiguous(), seed=3, backend="cuda"))
        assert out[:, :7].isnan().all() and out[:, 1294:].isnan().all()


def test_rows_do_not_depend_on_the_batch(device):
    for shape in ((5, 3, 33), (4, 2, 701), (3, 2, 12290)):
        g = torch.Generator().manual_seed(4)
        logits, on = (torch.randn(shape, generator=g).to(device) for _ in range(2))
        seeds = (torch.arange(shape[0]) + 2**35).to(device)

        def run(x, on, seeds):
            leaf = x.detach().requires_grad_()
            y = onepass.gumbel_softmax(leaf, 0.7, seed=seeds, backend="cuda")
            return y.detach(), torch.autograd.grad(y, leaf, on)[0]

        whole = run(logits, on, seeds)
        for b in range(shape[0]):
            alone = run(logits[b : b + 1], on[b : b + 1], seeds[b : b + 1])
            assert all(torch.equal(x[0], y[b]) for x, y in zip(alone, whole, strict=True))
