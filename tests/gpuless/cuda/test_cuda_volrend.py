"""Compositing in CUDA: every value and gradient against float64, dense and packed."""
from __future__ import annotations

import pytest
import torch

import onepass

import cases
from helpers import assert_as_good_as_torch
from volrend_rays import leaves, ragged, results, scene


@pytest.mark.parametrize("dtype", cases.FLOATS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("n_rays", "n_samples", "channels"), cases.RAYS)
def test_values_and_gradients(n_rays, n_samples, channels, packed, dtype, device):
    for alphas, depth, eps in ((False, "expected", 0.0), (True, "normalized", 0.0), (False, "median", 1e-3)):
        rays = scene(n_rays, n_samples, channels, alphas=alphas)
        rays[0] = rays[0] / (8 if alphas else 20)
        # The rule compares errors over many outputs: one or two would compare luck.
        back, prefix = leaves(rays, n_rays, channels, shared=depth != "normalized" and channels > 2)[4:]
        options = {"alphas": alphas, "depth": depth, "early_stop_eps": eps}
        there = dict(options)
        if packed:
            offsets = ragged(n_rays, n_samples)
            inside = torch.arange(n_samples) < offsets.diff()[:, None]
            rays = [x[inside] for x in rays]
            options["ray_offsets"], there["ray_offsets"] = offsets, offsets.to(device)
        rays, back, prefix = [x.to(dtype) for x in rays], back.to(dtype), prefix.to(dtype)
        got = results([x.to(device) for x in rays], back.to(device), prefix.to(device), dtype, "cuda", **there)
        same, truth = (results(rays, back, prefix, d, "reference", **options) for d in (dtype, torch.float64))
        for name, x in got.items():
            assert x.dtype == dtype
            if depth == "median" and name == "depth" and dtype != torch.float32:
                continue        # a half of the light may fall on either side of a sample's edge
            assert_as_good_as_torch(x.detach().cpu(), same[name], truth[name], f"{name} ({depth})")


def test_offsets_that_the_host_cannot_see_are_checked_by_the_kernel(device):
    """A ray whose offsets do not ascend within the samples is empty; the others are as they were."""
    density, features, t0, t1 = (x.flatten(0, 1).to(device) for x in scene(3, 40, 3, torch.float32))
    good, bad = torch.tensor([0, 50, 90, 120]), torch.tensor([0, 50, 90, 10**12])
    from onepass._native import volrend as native

    def run(offsets):
        arguments = (density, features, t0, t1, None, offsets.to(device), None, None, 0.0, "expected")
        ones = torch.ones(3, 3, device=device)
        forward = native.forward(*arguments, True, True)
        return forward, native.backward(ones, None, None, None, None, *arguments, [True] * 4 + [False] * 3)

    (right, right_grads), (wrong, wrong_grads) = run(good), run(bad)
    for a, b in zip(right[:3], wrong[:3], strict=True):
        assert torch.equal(a[:2], b[:2]) and not b[2].any()
    for a, b in zip(right_grads[:4], wrong_grads[:4], strict=True):
        assert torch.equal(a[:90], b[:90])


def test_a_background_that_all_rays_share_has_one_gradient_whatever_the_order(device):
    density, features, t0, t1 = (x.to(device) for x in scene(700, 5, 3, torch.float32))
    back = torch.rand(3, device=device, requires_grad=True)
    out = onepass.composite(density, features, t0, t1, background=back, backend="cuda")
    grad = torch.randn(700, 3, generator=torch.Generator().manual_seed(1)).to(device)
    first, second = (torch.autograd.grad(out.features, back, grad, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    left = 1 - out.opacity.double()
    torch.testing.assert_close(first.double(), (left[:, None] * grad.double()).sum(0), rtol=1e-5, atol=1e-5)
