"""lerp and slerp in CUDA: vectors of a warp, of a block, in parts, and in parts of several tiles."""
from __future__ import annotations

import math

import pytest
import torch

import onepass

import cases
from helpers import assert_as_good_as_torch

# The first and the last of each kind; 524300 elements are 257 tiles, so parts of two.
LENGTHS = (1, 31, 512, 513, 8192, 8193, 20001)
LONGEST = 524300
FUNCTIONS = [onepass.lerp, onepass.slerp]


def randn(shape, seed, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def with_gradients(function, a, b, t, on, device="cpu", **options):
    leaves = [x.detach().to(device, copy=True).requires_grad_() for x in (a, b, t)]
    result = function(*leaves, **options)
    return [x.detach().cpu() for x in (result, *torch.autograd.grad(result, leaves, on.to(device, result.dtype)))]


def plain(function, a, b, t):
    t = t[:, None].to(a.dtype)
    if function is onepass.lerp:
        return (1 - t) * a + t * b
    u, v = (x / torch.linalg.vector_norm(x, dim=1, keepdim=True) for x in (a, b))
    w = torch.acos((u * v).sum(1, keepdim=True).clamp(-1, 1))
    path = (torch.sin((1 - t) * w) * a + torch.sin(t * w) * b) / torch.sin(w)
    return path if a.shape[1] > 1 else torch.lerp(a, b, t)          # vectors of one element, all positive here


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", cases.FLOATS)
@pytest.mark.parametrize("n", LENGTHS)
def test_values_and_gradients(n, dtype, function, device):
    rows = 2 + 100 // n
    a, b, on = (randn((rows, n), seed, dtype) for seed in range(3))
    if n == 1:
        a, b = a.abs(), b.abs()
    t = torch.linspace(0.1, 0.9, rows)
    got = with_gradients(function, a, b, t, on, device, backend="cuda")
    again = with_gradients(function, a, b, t, on, device, backend="cuda")
    assert all(map(torch.equal, got, again))
    same = with_gradients(lambda *x: plain(function, *x), a, b, t, on)
    truth = with_gradients(function, *(x.double() for x in (a, b, t)), on, backend="reference")
    for name, x, y, z in zip(("path", "start's", "end's", "weight's"), got, same, truth, strict=True):
        assert_as_good_as_torch(x, y, z, name)


@pytest.mark.parametrize("n", [2, 40, 600, 9001])
def test_vectors_without_an_angle_and_bad_ones_are_the_references(n, device):
    inf, nan = math.inf, math.nan
    a, b, on = (randn((10, n), seed) for seed in range(3))
    b[0], b[1], b[2], a[3], b[3], a[4] = 2 * a[0], -2 * a[1], 0, 0, 0, 0
    a[5, n // 2], b[6, 0], a[7] = inf, nan, a[7] * 1e-30
    a[8, n - 1] = a[8, n // 2] = 0                                  # two axes in which it is smallest
    b[8] = -a[8]
    t = torch.linspace(0.1, 0.8, 10)
    t[9] = nan
    got, want = (with_gradients(onepass.slerp, a, b, t, on, where, backend=backend)
                 for where, backend in ((device, "cuda"), ("cpu", "cpu")))
    for x, y, z in zip(got, want, with_gradients(onepass.slerp, a, b, t, on, backend="reference"), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5 * n**0.5, equal_nan=True)
        torch.testing.assert_close(x[:5], z[:5], rtol=1e-5, atol=1e-5 * n**0.5)


def test_the_longest_vectors_join_parts_of_several_tiles(device):
    a, b, on = (randn((2, LONGEST), seed) for seed in range(3))
    b[1] = -3 * a[1]
    a[1, LONGEST - 3] = b[1, LONGEST - 3] = 0                       # the axis is in the last part
    t = torch.tensor([0.3, 0.6])
    got = with_gradients(onepass.slerp, a, b, t, on, device, backend="cuda")
    want = with_gradients(onepass.slerp, a, b, t, on, backend="cpu")
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
    alone = with_gradients(onepass.slerp, a[1:], b[1:], t[1:], on[1:], device, backend="cuda")
    assert all(torch.equal(x[0], y[1]) for x, y in zip(alone, got, strict=True))


@pytest.mark.parametrize("n", [33, 700, 9001])
def test_a_row_does_not_depend_on_the_batch_and_all_rows_share_a_weight(n, device):
    a, b, on = (randn((3, 2, n), seed) for seed in range(3))
    t = torch.tensor([0.2, 0.5, 0.9])
    for function in FUNCTIONS:
        options = {} if function is onepass.lerp else {"dim": -1}
        run = lambda *x, f=function, o=options: with_gradients(f, *x, device, backend="cuda", **o)
        whole = run(a, b, t, on)
        for i in range(3):
            alone = run(a[i : i + 1], b[i : i + 1], t[i : i + 1], on[i : i + 1])
            assert all(torch.equal(x[0], y[i]) for x, y in zip(alone, whole, strict=True))
        rows, one = (run(a, b, torch.full(shape, 0.4), on)[3] for shape in ((3,), ()))
        torch.testing.assert_close(one, rows.sum())


@pytest.mark.parametrize("dtype", cases.FLOATS)
def test_views_are_read_and_ends_read_nothing_else(dtype, device):
    base = randn((3, 8, 301), 0, dtype).to(device)
    a, b = base[:, :4, 1:], base[:, 4:, :-1]
    t = torch.tensor([0.0, 1.0, 0.3], device=device)
    for function in FUNCTIONS:
        got = function(a, b, t, backend="cuda")
        assert torch.equal(got, function(a.contiguous(), b.contiguous(), t, backend="cuda"))
        assert torch.equal(function(base[:, :4], base[:, 4:], t, backend="cuda"),
                           function(base[:, :4].contiguous(), base[:, 4:].contiguous(), t, backend="cuda"))
        lost = torch.full_like(a, math.nan)
        assert torch.equal(function(a, lost, t, backend="cuda")[0], a[0])
        assert torch.equal(function(lost, b, t, backend="cuda")[1], b[1])
