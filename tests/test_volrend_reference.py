"""The reference of composite: published numbers, a loop over samples, gradcheck."""
import itertools
import math

import pytest
import torch

import onepass
from onepass.reference import volrend as reference

from helpers import ALL_BACKENDS
from volrend_rays import DEPTHS, leaves, render, scene

pytestmark = pytest.mark.usefixtures("on_its_device")

# ---- known answers ----


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_published_weights_and_gradients(backend):
    """nerfacc's own numbers: three rays of 1, 0 and 4 samples."""
    sigmas = torch.tensor([0.4, 0.8, 0.1, 0.8, 0.1], requires_grad=True)
    offsets, zeros = torch.tensor([0, 1, 1, 5]), torch.zeros(5)
    out = onepass.composite(
        sigmas, torch.ones(5, 1), zeros, zeros + 1, ray_offsets=offsets, return_weights=True, backend=backend
    )
    torch.testing.assert_close(
        out.weights, torch.tensor([0.3297, 0.5507, 0.0428, 0.2239, 0.0174]), atol=6e-5, rtol=0
    )
    assert out.features[1] == out.opacity[1] == out.depth[1] == 0
    (grad,) = torch.autograd.grad(out.weights.sum(), sigmas)
    torch.testing.assert_close(grad, torch.tensor([0.6703, 0.1653, 0.1653, 0.1653, 0.1653]), atol=6e-5, rtol=0)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_published_visibility(backend):
    """T = [1, 1, .7, .14, .028]: the last sample is left out at eps = 0.03, what lies at T >= eps is not."""
    alphas = torch.tensor([0.4, 0.3, 0.8, 0.8, 0.5])
    zeros, offsets = torch.zeros(5), torch.tensor([0, 1, 1, 5])
    run = lambda eps: onepass.composite(
        None, torch.ones(5, 1), zeros, zeros, alphas=alphas, ray_offsets=offsets, early_stop_eps=eps,
        return_weights=True, backend=backend,
    ).weights
    expected = torch.tensor([0.4, 0.3, 0.7 * 0.8, 0.14 * 0.8, 0.028 * 0.5])
    torch.testing.assert_close(run(0.0), expected)
    torch.testing.assert_close(run(0.03), expected * torch.tensor([1, 1, 1, 1, 0]))
    torch.testing.assert_close(run(0.5), expected * torch.tensor([1, 1, 1, 0, 0]))
    halves = torch.full((4,), 0.5)      # T = 1, 1/2, 1/4: exactly eps counts
    weights = onepass.composite(
        None, torch.ones(1, 4, 1), halves[None], halves[None], alphas=halves[None], early_stop_eps=0.25,
        return_weights=True, backend=backend,
    ).weights
    assert weights.tolist() == [[0.5, 0.25, 0.125, 0.0]]


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_published_sample_counts(backend):
    """fVDB: rays of 10, 4, 0 and 6 samples composite 3, 4, 0 and 3 of them at a threshold of 0.01."""
    sizes, sigma = torch.tensor([10, 4, 0, 6]), torch.tensor([20.0, 0.1, 0.0, 20.0])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
    starts = torch.cat([0.1 * torch.arange(n) for n in sizes.tolist()])
    weights = onepass.composite(
        sigma.repeat_interleave(sizes), torch.ones(20, 1), starts, starts + 0.1, ray_offsets=offsets,
        early_stop_eps=0.01, return_weights=True, backend=backend,
    ).weights
    assert [int((w > 0).sum()) for w in weights.split(sizes.tolist())] == [3, 4, 0, 3]


# ---- reference against the formulas ----


def loop(density, features, t_starts, t_ends, alphas, offsets, background, prefix, eps, depth):
    """The formulas, sample by sample, in Python floats: (features, depth, opacity, weights, distortion)."""
    outs = []
    for r in range(len(offsets) - 1):
        light = 1.0 if prefix is None else float(prefix[r])
        color, weights, mids, deltas, median = [0.0] * features.shape[-1], [], [], [], None
        for i in range(offsets[r], offsets[r + 1]):
            if not light >= eps:
                weights += [0.0] * (offsets[r + 1] - i)
                break
            delta, mid = float(t_ends[i] - t_starts[i]), float(t_ends[i] + t_starts[i]) / 2
            alpha = float(density[i]) if alphas else 1 - math.exp(-float(density[i]) * delta)
            weights.append(light * alpha)
            color = [a + weights[-1] * float(b) for a, b in zip(color, features[i], strict=True)]
            light *= 1 - alpha
            mids.append(mid)
            deltas.append(delta)
            if light <= 0.5 and median is None:
                median = mid
        opacity, n = sum(weights), len(mids)
        along = sum(w * m for w, m in zip(weights, mids, strict=False))
        if depth == "normalized":
            along /= max(opacity, 2.0**-23)
        if depth == "median":
            along = median if median is not None else (mids[-1] if mids else 0.0)
        if background is not None:
            back = background if background.dim() == 1 else background[r]
            left = (1.0 if prefix is None else float(prefix[r])) - opacity
            color = [a + left * float(b) for a, b in zip(color, back, strict=True)]
        spread = sum(weights[i] * weights[j] * abs(mids[i] - mids[j]) for i in range(n) for j in range(n))
        spread += sum(weights[i] ** 2 * deltas[i] for i in range(n)) / 3
        outs.append((color, along, opacity, weights, spread))
    columns = list(zip(*outs, strict=True))
    columns[3] = list(itertools.chain(*columns[3]))
    return [torch.tensor(x, dtype=torch.float64) for x in columns]


@pytest.mark.parametrize("alphas", [False, True])
@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("eps", [0.0, 0.1])
@pytest.mark.parametrize("background", [None, (3,), (6, 3)])
def test_reference_against_a_loop(alphas, depth, eps, background):
    rays = scene(6, 9, 3, alphas=alphas)
    prefix = torch.tensor([1.0, 0.5, 0.05, 0.0, 0.9, 1.0], dtype=torch.float64) if eps else None
    back = None if background is None else torch.rand(background, dtype=torch.float64)
    options = {"early_stop_eps": eps, "depth": depth, "background": back, "prefix_trans": prefix,
               "return_weights": True, "distortion": True, "alphas": alphas, "backend": "reference"}
    flat = [x.flatten(0, 1) for x in rays]
    got = render(*rays, **options)
    expected = loop(*flat, alphas, list(range(0, 55, 9)), back, prefix, eps, depth)
    for name, a, b in zip(got._fields, got, expected, strict=True):
        torch.testing.assert_close(a, b.reshape(a.shape), msg=lambda m, name=name: f"{name}: {m}")
    offsets = torch.tensor([0, 9, 9, 20, 21, 40, 54])
    flat[2:] = [x + 20 * torch.arange(6, dtype=x.dtype).repeat_interleave(9) for x in flat[2:]]     # ascending
    got = render(*flat, **options, ray_offsets=offsets)
    expected = loop(*flat, alphas, offsets.tolist(), back, prefix, eps, depth)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("alphas", [False, True])
@pytest.mark.parametrize("depth", ["expected", "normalized"])
@pytest.mark.parametrize("packed", [False, True])
def test_gradcheck(alphas, depth, packed):
    rays = scene(3, 4, 2, alphas=alphas)
    if alphas:
        rays[0][0, 1] = 1.0
    offsets = torch.tensor([0, 5, 5, 12]) if packed else None
    if packed:
        rays = [x.flatten(0, 1) for x in rays]
        rays[2:] = [x + 10 * torch.arange(12, dtype=torch.float64) for x in rays[2:]]       # ascending
    inputs = leaves(rays, 3, 2, shared=not alphas)

    def through_the_op(*x):
        out = render(*x[:4], background=x[4], prefix_trans=x[5], alphas=alphas, depth=depth, ray_offsets=offsets,
                     return_weights=True, distortion=True, early_stop_eps=0.01, backend="reference")
        return tuple(out)

    def reference_alone(*x):
        density = (None, x[0]) if alphas else (x[0], None)
        return reference.composite(density[0], *x[1:4], density[1], offsets, *x[4:], 0.01, depth, True, True)

    assert torch.autograd.gradcheck(through_the_op, inputs)
    assert torch.autograd.gradcheck(reference_alone, inputs)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_gradient_behind_and_at_full_opacity(backend):
    """alpha = 1: exact, where the usual division by 1 - alpha gives NaN. d/dalpha_2 = T_2 (c_2 - what lies behind)."""
    alphas = torch.tensor([[0.5, 1.0, 0.25, 1.0]], requires_grad=True)
    colors, t = torch.tensor([[[1.0], [2.0], [4.0], [8.0]]]), torch.arange(4.0)[None]
    out = onepass.composite(None, colors, t, t + 1, alphas=alphas, background=torch.tensor([16.0]), backend=backend)
    (grad,) = torch.autograd.grad(out.features.sum(), alphas)
    assert out.features.item() == 1.5
    assert grad.tolist() == [[1.0 - 2.0, 0.5 * (2 - (0.25 * 4 + 0.75 * 8)), 0.0, 0.0]]
