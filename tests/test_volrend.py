"""composite on every backend: against float64, poisoned, alone and in batches, on every instruction set."""
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import onepass

import cases
from helpers import ALL_BACKENDS, INTERPRETED, ISAS, KERNELS, assert_as_good_as_torch, run_python
from volrend_rays import DEPTHS, leaves, ragged, render, results, scene

pytestmark = pytest.mark.usefixtures("on_its_device")

NAN = math.nan


# ---- every backend against float64 ----


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", cases.FLOATS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("n_rays", "n_samples", "channels"), cases.RAYS)
def test_values_and_gradients(n_rays, n_samples, channels, packed, dtype, backend):
    """Of enough rays that the rule compares errors and not luck; a background each, for the same reason."""
    if INTERPRETED:                 # a ray costs milliseconds: a third of the cases, of few rays
        if dtype == torch.float16 or packed != bool(channels % 2):
            pytest.skip("interpreted, a program takes a millisecond: this combination runs on a GPU only")
        n_rays = min(n_rays, 24)
    else:
        n_rays *= 1 + 300 // max(n_rays, 1)
    for alphas, depth, eps in ((False, "expected", 0.0), (True, "normalized", 0.0), (False, "median", 1e-3)):
        rays = scene(n_rays, n_samples, channels, alphas=alphas)
        # Opacities away from 0, by which "normalized" divides: a few faint rays would stand for all errors.
        rays[0] = 0.02 + rays[0] / 8 if alphas else rays[0] / 20
        back, prefix = leaves(rays, n_rays, channels, shared=False)[4:]
        options = {"alphas": alphas, "depth": depth, "early_stop_eps": eps}
        if packed:
            offsets = ragged(n_rays, n_samples)
            inside = torch.arange(n_samples) < offsets.diff()[:, None]
            rays = [x[inside] for x in rays]
            options["ray_offsets"] = offsets
        rays, back, prefix = [x.to(dtype) for x in rays], back.to(dtype), prefix.to(dtype)
        got, same, truth = (
            results(rays, back, prefix, d, b, **options)
            for d, b in ((dtype, backend), (dtype, "reference"), (torch.float64, "reference"))
        )
        for name, x in got.items():
            assert x.dtype == dtype
            if depth == "median" and name == "depth" and dtype != torch.float32:
                continue        # a half of the light may fall on either side of a sample's edge
            assert_as_good_as_torch(x, same[name], truth[name], f"{name} ({depth})")


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("channels", [1, 3, 4, 7, 70])
def test_the_gradient_of_a_shared_background_is_the_sum_of_those_of_its_rays(channels, backend):
    n_rays = 6 if INTERPRETED else 50
    rays = scene(n_rays, 30, channels, torch.float32)
    rays[0] = rays[0] / 9
    back, prefix = (x.float() for x in leaves(rays, n_rays, channels)[4:])
    shared, own = (results(rays, x, prefix, torch.float32, backend) for x in (back, back.expand(n_rays, channels)))
    assert torch.equal(shared["features"], own["features"])
    expected = own["d_background"].double().sum(0)
    scale = own["d_background"].double().abs().sum(0)
    assert ((shared["d_background"].double() - expected).abs() <= 2**-23 * scale).all()


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_dtypes_may_differ(backend):
    density, features, t0, t1 = scene(4, 40, 3, torch.float32)
    out = onepass.composite(density, features.bfloat16(), t0, t1, return_weights=True, distortion=True,
                            background=torch.ones(3), backend=backend)
    assert [x.dtype for x in out] == [torch.bfloat16, *[torch.float32] * 4]
    wide = onepass.composite(density.double(), features.bfloat16().double(), t0.double(), t1.double(),
                             background=torch.ones(3).double())
    torch.testing.assert_close(out.features.double(), wide.features, atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(out.depth.double(), wide.depth, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_zero_and_huge_densities(backend):
    sigmas = torch.tensor([[0.0, 0.0, 0.0], [math.inf, 1.0, 1.0], [1e30, 1e30, 1e30], [0.0, math.inf, math.inf]],
                          requires_grad=True)
    t = torch.arange(3.0).expand(4, 3).clone().requires_grad_()
    ends = (t.detach() + torch.tensor([1.0, 1.0, 0.0])).requires_grad_()
    colors = torch.tensor([1.0, 2.0, 3.0])[None, :, None].expand(4, 3, 1).clone().requires_grad_()
    out = onepass.composite(sigmas, colors, t, ends, background=torch.tensor([7.0]), return_weights=True,
                            distortion=True, backend=backend)
    assert out.features[:, 0].tolist() == [7.0, 1.0, 1.0, 2.0]
    assert out.opacity.tolist() == [0.0, 1.0, 1.0, 1.0]
    grads = torch.autograd.grad(out.features.sum() + out.depth.sum() + out.distortion.sum(), (sigmas, colors, t, ends))
    assert all(g.isfinite().all() for g in grads)
    assert grads[0][0].tolist() == [1.0 + 0.5 - 7.0, 2.0 + 1.5 - 7.0, 0.0]


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_median_is_the_middle_of_the_first_sample_behind_which_half_is_left(backend):
    """Exactly one half counts; where more is left the last sample is the one, truncated ones aside."""
    alphas = torch.tensor([[0.5] * 4, [0.25] * 4, [0.25, 0.25, 0.0, 0.0], [0.4, 0.3, 0.0, 0.0]])
    t = torch.arange(4.0).expand(4, 4)
    median = lambda **more: onepass.composite(
        None, t[..., None], t, t + 1, alphas=alphas, depth="median", backend=backend, **more
    ).depth.tolist()
    assert median() == [0.5, 2.5, 3.5, 1.5]
    assert median(early_stop_eps=0.6) == [0.5, 1.5, 1.5, 1.5]


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_normalized_depth_of_rays_that_see_next_to_nothing(backend):
    """Divided by 2^-23 where the opacity is below it: no NaN forward or backward, and the values of float64."""
    faint = torch.tensor([0.0, 1e-20, 1e-9, 2.0**-26, 1e-2, 0.1, 1.0])
    found = []
    for dtype, name in ((torch.float32, backend), (torch.float64, "reference")):
        sigmas = faint.to(dtype)[:, None].expand(7, 3).clone().requires_grad_()
        t = torch.arange(3, dtype=dtype).expand(7, 3)
        out = onepass.composite(sigmas, t[..., None], t, t + 1, depth="normalized", backend=name)
        found.append((out.depth, *torch.autograd.grad((out.depth + out.opacity).sum(), sigmas)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("alphas", [False, True])
def test_nan_in_a_sample_that_counts_shows_and_ends_its_ray(backend, alphas):
    """A NaN in front leaves no comparison true, so nothing behind it counts; other rays keep their bits."""
    clean = scene(4, 40, 2, torch.float32, alphas=alphas)
    clean[0] = clean[0] / 9
    poisoned = [clean[0].clone(), *clean[1:]]
    poisoned[0][1, 21] = NAN
    run = lambda rays: render(*rays, alphas=alphas, return_weights=True, distortion=True, backend=backend)
    a, b = run(clean), run(poisoned)
    others = torch.tensor([0, 2, 3])
    assert all(torch.equal(x[others], y[others]) for x, y in zip(a, b, strict=True))
    assert torch.equal(a.weights[1, :21], b.weights[1, :21])
    assert b.weights[1, 21].isnan() and not b.weights[1, 22:].any()
    assert all(x[1].isnan().all() for x in (b.features, b.depth, b.opacity, b.distortion))


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
@pytest.mark.parametrize("depth", DEPTHS)
def test_nothing_to_composite(shape, depth, backend):
    x = torch.zeros(shape, requires_grad=True)
    back = torch.ones(2, requires_grad=True)
    out = onepass.composite(x, torch.zeros(*shape, 2), x.detach(), x.detach(), background=back, depth=depth,
                            return_weights=True, distortion=True, backend=backend)
    assert torch.equal(out.features, torch.ones(shape[0], 2)) and not out.depth.any() and not out.opacity.any()
    assert out.weights.shape == shape and not out.distortion.any()
    assert torch.autograd.grad(out.features.sum(), back)[0].tolist() == [shape[0]] * 2


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("alphas", [False, True])
@pytest.mark.parametrize("channels", [1, 3, 5, 40])
def test_poison_behind_the_stop_reaches_nothing(backend, alphas, channels):
    clean = scene(5, 50, channels, torch.float32, alphas=alphas)
    clean[0] = clean[0] / 4
    live = render(*clean, alphas=alphas, early_stop_eps=0.05, return_weights=True, backend="reference").weights > 0
    dead = ~live.cumsum(1).gt(0) | (live.flip(1).cumsum(1).flip(1) == 0)
    assert dead.any(1).all()
    poisoned = [torch.where(dead if x.dim() == 2 else dead[..., None], NAN, x) for x in clean]
    options = {"early_stop_eps": 0.05, "alphas": alphas, "depth": "normalized"}
    back, prefix = torch.ones(channels), torch.ones(5)
    a, b = (results(x, back, prefix, torch.float32, backend, **options) for x in (clean, poisoned))
    for name, x in a.items():
        assert torch.equal(x, b[name]), name
    for name in ("d_density", "d_features", "d_starts", "d_ends"):
        assert not b[name][dead].any(), name


# ---- layout, batches, threads ----


@pytest.mark.parametrize("backend", KERNELS)
@settings(deadline=None, max_examples=15 if INTERPRETED else 40)
@given(data=st.data())
def test_views(backend, data):
    """Edges shared between starts and ends, crops, expanded times: the bits of contiguous copies."""
    n, s, c = (data.draw(st.integers(1, k)) for k in (6, 40, 7))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    rand = lambda *size: torch.rand(size, generator=g, device="cpu").to(torch.get_default_device())
    edges = rand(1 if data.draw(st.booleans()) else n, s + 3).cumsum(1).expand(n, s + 3)
    t0, t1 = edges[:, 1 : s + 1], edges[:, 2 : s + 2]
    sigmas = rand(n + 2, s + 5)[1 : n + 1, 2 : s + 2]
    features = rand(n, s + 2, c + 1)[:, 1 : s + 1, : c + data.draw(st.integers(0, 1))]
    if data.draw(st.booleans()):
        sigmas, features = sigmas.t().contiguous().t(), features.transpose(0, 1).contiguous().transpose(0, 1)
    run = lambda *x: onepass.composite(*x, return_weights=True, distortion=True, backend=backend)
    expected = run(*(x.contiguous() for x in (sigmas, features, t0, t1)))
    assert all(map(torch.equal, run(sigmas, features, t0, t1), expected))


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("channels", [1, 3, 6, 70])
def test_a_ray_has_the_same_bits_alone_in_a_batch_packed_and_on_any_threads(backend, channels):
    """The reference sums with PyTorch, whose order is its own: there only runs are compared."""
    n_rays = 8 if INTERPRETED else 40
    rays = scene(n_rays, 70, channels, torch.float32)
    offsets = ragged(n_rays, 70)
    inside = torch.arange(70) < offsets.diff()[:, None]
    packed = [x[inside] for x in rays]
    back, prefix = torch.rand(channels), torch.rand(n_rays)
    options = {"early_stop_eps": 1e-3, "depth": "normalized"}
    run = lambda rays, prefix, **more: results(rays, back, prefix, torch.float32, backend, **options, **more)
    whole = run(packed, prefix, ray_offsets=offsets * 1)
    again = run(packed, prefix, ray_offsets=offsets * 1)
    assert all(torch.equal(x, again[name]) for name, x in whole.items())
    if backend == "reference":
        return
    threads = torch.get_num_threads()
    by_ray = ("features", "depth", "opacity", "distortion")
    try:
        for n in (1, 2, 3, 7) if backend == "cpu" else (5,):
            torch.set_num_threads(n)
            other = run(packed, prefix, ray_offsets=offsets)
            assert all(torch.equal(x, other[name]) for name, x in whole.items())
            for r in range(0, n_rays, n):
                a, b = int(offsets[r]), int(offsets[r + 1])
                dense = [x[r : r + 1, : b - a] for x in rays]
                out = render(*dense, background=back, prefix_trans=prefix[r : r + 1], return_weights=True,
                             distortion=True, backend=backend, **options)
                assert all(torch.equal(getattr(out, k)[0], whole[k][r]) for k in by_ray)
                assert torch.equal(out.weights[0], whole["weights"][a:b])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", KERNELS)
def test_gradients_do_not_depend_on_the_batch(backend):
    rays, prefix = scene(9, 50, 3, torch.float32), torch.rand(9)
    names = ("features", "depth", "opacity", "weights", "distortion")

    def gradients(part):
        inputs = [x[part].detach().requires_grad_() for x in rays]
        out = render(*inputs, prefix_trans=prefix[part], return_weights=True, distortion=True, backend=backend)
        return torch.autograd.grad(sum((getattr(out, k) * (1 + i)).sum() for i, k in enumerate(names)), inputs)

    whole = gradients(slice(None))
    for r in range(9):
        assert all(torch.equal(a[0], b[r]) for a, b in zip(gradients(slice(r, r + 1)), whole, strict=True))


ISA_CODE = """
import torch, onepass
from onepass import _native
assert _native._C.isa == {isa!r}
g = torch.Generator().manual_seed(0)
for channels in (1, 2, 3, 4, 6, 9, 37, 70):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        edges = torch.rand(4, 54, generator=g).cumsum(1).to(dtype)
        inputs = [x.to(dtype).requires_grad_() for x in (
            torch.rand(4, 53, generator=g) / 9, torch.rand(4, 53, channels, generator=g), edges[:, :-1], edges[:, 1:])]
        found = []
        for backend in ("cpu", "reference"):
            out = onepass.composite(*inputs, early_stop_eps=0.01, background=torch.ones(channels), return_weights=True,
                                    distortion=True, depth="normalized", backend=backend)
            found.append((*out, *torch.autograd.grad(sum(x.float().sum() for x in out), inputs)))
        tolerance = {{"atol": 2e-5, "rtol": 2e-5}} if dtype == torch.float32 else {{"atol": 2e-3, "rtol": 2e-2}}
        for a, b in zip(*found):
            torch.testing.assert_close(a, b, **tolerance)
print("ok")
"""


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa):
    assert run_python(ISA_CODE.format(isa=isa), ONEPASS_CPU_ISA=isa).strip() == "ok"


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_out(backend):
    rays = scene(4, 20, 3, torch.float32)
    wide = torch.full((4, 5), NAN)
    out = onepass.Rendering(wide[:, 1:4], torch.empty(4), torch.empty(4), torch.empty(4, 20), None)
    got = render(*rays, out=out, return_weights=True, backend=backend)
    expected = render(*rays, return_weights=True, backend=backend)
    assert got.features.data_ptr() == wide[:, 1:4].data_ptr() and wide[:, [0, 4]].isnan().all()
    assert all(torch.equal(a, b) for a, b in zip(out[:4], expected[:4], strict=True)) and got.distortion is None


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", cases.FLOATS)
@pytest.mark.parametrize("shape", [(300, 0), (0, 9), (37, 21)])
def test_nothing_is_written_beyond_the_outputs(shape, dtype, backend):
    density, features, t0, t1 = scene(*shape, 3, dtype)
    sizes = ((shape[0], 3), shape[:1], shape[:1], shape, shape[:1])
    guarded = [torch.full((math.prod(size) + 2000,), NAN, dtype=dtype) for size in sizes]
    out = [x[1000:-1000].view(size) for x, size in zip(guarded, sizes, strict=True)]
    got = onepass.composite(density, features, t0, t1, background=torch.ones(3), return_weights=True, distortion=True,
                            out=tuple(out), backend=backend)
    assert all(x.data_ptr() == y.data_ptr() and x.isfinite().all() for x, y in zip(got, out, strict=True))
    assert all(x[:1000].isnan().all() and x[-1000:].isnan().all() for x in guarded)
