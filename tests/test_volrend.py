"""composite: against published numbers, a loop over samples, gradcheck and float64, on every backend."""

import itertools
import math

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st

import onepass
from onepass.reference import volrend as reference

import cases
from helpers import ISAS, assert_as_good_as_torch, run_python

BACKENDS = ["reference", pytest.param("cpu", marks=pytest.mark.skipif(not ISAS, reason="no native extension"))]
needs_native = pytest.mark.skipif(not ISAS, reason="no native extension")
DEPTHS = ("expected", "normalized", "median")
NAN = math.nan


def scene(n_rays, n_samples, channels, dtype=torch.float64, seed=0, alphas=False):
    """(density, features, t_starts, t_ends) of dense rays with gaps between samples."""
    g = torch.Generator().manual_seed(seed)
    edges = 1 + torch.rand(n_rays, 2 * n_samples, generator=g, dtype=torch.float64).cumsum(1)
    density = torch.rand(n_rays, n_samples, generator=g, dtype=torch.float64) * (1 if alphas else 3)
    features = torch.randn(n_rays, n_samples, channels, generator=g, dtype=torch.float64)
    return [x.to(dtype) for x in (density, features, edges[:, ::2].contiguous(), edges[:, 1::2].contiguous())]


def render(density, features, t_starts, t_ends, alphas=False, **options):
    if alphas:
        return onepass.composite(None, features, t_starts, t_ends, alphas=density, **options)
    return onepass.composite(density, features, t_starts, t_ends, **options)


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


def ragged(n_rays, longest, seed=0):
    counts = torch.randint(0, longest + 1, (n_rays,), generator=torch.Generator().manual_seed(seed))
    return torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])


# ---- known answers ----


@pytest.mark.parametrize("backend", BACKENDS)
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


@pytest.mark.parametrize("backend", BACKENDS)
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


@pytest.mark.parametrize("backend", BACKENDS)
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


def leaves(rays, n_rays, channels, shared=True):
    g = torch.Generator().manual_seed(5)
    back = torch.rand((channels,) if shared else (n_rays, channels), generator=g, dtype=torch.float64)
    prefix = 0.2 + 0.8 * torch.rand(n_rays, generator=g, dtype=torch.float64)
    return [x.detach().requires_grad_() for x in (*rays, back, prefix)]


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


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_behind_and_at_full_opacity(backend):
    """alpha = 1: exact, where the usual division by 1 - alpha gives NaN. d/dalpha_2 = T_2 (c_2 - what lies behind)."""
    alphas = torch.tensor([[0.5, 1.0, 0.25, 1.0]], requires_grad=True)
    colors, t = torch.tensor([[[1.0], [2.0], [4.0], [8.0]]]), torch.arange(4.0)[None]
    out = onepass.composite(None, colors, t, t + 1, alphas=alphas, background=torch.tensor([16.0]), backend=backend)
    (grad,) = torch.autograd.grad(out.features.sum(), alphas)
    assert out.features.item() == 1.5
    assert grad.tolist() == [[1.0 - 2.0, 0.5 * (2 - (0.25 * 4 + 0.75 * 8)), 0.0, 0.0]]


# ---- every backend against float64 ----


def results(rays, back, prefix, dtype, backend, **options):
    inputs = [x.detach().to(dtype).requires_grad_() for x in (*rays, back, prefix)]
    out = render(*inputs[:4], background=inputs[4], prefix_trans=inputs[5], backend=backend,
                 return_weights=True, distortion=True, **options)
    g = torch.Generator().manual_seed(9)
    with_grad = [x for x in out if x.requires_grad]
    grads = [torch.randn(x.shape, generator=g, dtype=torch.float64).to(dtype) for x in with_grad]
    found = torch.autograd.grad(with_grad, inputs, grads, allow_unused=True, materialize_grads=True)
    return dict(zip((*out._fields, "d_density", "d_features", "d_starts", "d_ends", "d_background", "d_prefix"),
                    (*out, *found), strict=True))


@needs_native
@pytest.mark.parametrize("dtype", cases.FLOATS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("n_rays", "n_samples", "channels"), cases.RAYS)
def test_values_and_gradients(n_rays, n_samples, channels, packed, dtype):
    for alphas, depth, eps in ((False, "expected", 0.0), (True, "normalized", 0.0), (False, "median", 1e-3)):
        rays = scene(n_rays, n_samples, channels, alphas=alphas)
        rays[0] = rays[0] / (8 if alphas else 20)
        back, prefix = leaves(rays, n_rays, channels, shared=depth != "normalized")[4:]
        options = {"alphas": alphas, "depth": depth, "early_stop_eps": eps}
        if packed:
            offsets = ragged(n_rays, n_samples)
            inside = torch.arange(n_samples) < offsets.diff()[:, None]
            rays = [x[inside] for x in rays]
            options["ray_offsets"] = offsets
        rays, back, prefix = [x.to(dtype) for x in rays], back.to(dtype), prefix.to(dtype)
        got, same, truth = (
            results(rays, back, prefix, d, b, **options)
            for d, b in ((dtype, "cpu"), (dtype, "reference"), (torch.float64, "reference"))
        )
        for name, x in got.items():
            assert x.dtype == dtype
            if depth == "median" and name == "depth" and dtype != torch.float32:
                continue        # a half of the light may fall on either side of a sample's edge
            assert_as_good_as_torch(x, same[name], truth[name], f"{name} ({depth})")


@pytest.mark.parametrize("backend", BACKENDS)
def test_dtypes_may_differ(backend):
    density, features, t0, t1 = scene(4, 40, 3, torch.float32)
    out = onepass.composite(density, features.bfloat16(), t0, t1, return_weights=True, distortion=True,
                            background=torch.ones(3), backend=backend)
    assert [x.dtype for x in out] == [torch.bfloat16, *[torch.float32] * 4]
    wide = onepass.composite(density.double(), features.bfloat16().double(), t0.double(), t1.double(),
                             background=torch.ones(3).double())
    torch.testing.assert_close(out.features.double(), wide.features, atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(out.depth.double(), wide.depth, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
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


@pytest.mark.parametrize("backend", BACKENDS)
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


@pytest.mark.parametrize("backend", BACKENDS)
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


@needs_native
@settings(deadline=None, max_examples=40)
@given(st.data())
def test_views(data):
    """Edges shared between starts and ends, crops, expanded times: the bits of contiguous copies."""
    n, s, c = (data.draw(st.integers(1, k)) for k in (6, 40, 7))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    edges = torch.rand(1 if data.draw(st.booleans()) else n, s + 3, generator=g).cumsum(1).expand(n, s + 3)
    t0, t1 = edges[:, 1 : s + 1], edges[:, 2 : s + 2]
    sigmas = torch.rand(n + 2, s + 5, generator=g)[1 : n + 1, 2 : s + 2]
    features = torch.rand(n, s + 2, c + 1, generator=g)[:, 1 : s + 1, : c + data.draw(st.integers(0, 1))]
    if data.draw(st.booleans()):
        sigmas, features = sigmas.t().contiguous().t(), features.transpose(0, 1).contiguous().transpose(0, 1)
    run = lambda *x: onepass.composite(*x, return_weights=True, distortion=True, backend="cpu")
    expected = run(*(x.contiguous() for x in (sigmas, features, t0, t1)))
    assert all(map(torch.equal, run(sigmas, features, t0, t1), expected))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("channels", [1, 3, 6, 70])
def test_a_ray_has_the_same_bits_alone_in_a_batch_packed_and_on_any_threads(backend, channels):
    """The reference sums with PyTorch, whose order is its own: there only runs are compared."""
    rays = scene(40, 70, channels, torch.float32)
    offsets = ragged(40, 70)
    inside = torch.arange(70) < offsets.diff()[:, None]
    packed = [x[inside] for x in rays]
    back, prefix = torch.rand(channels), torch.rand(40)
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
        for n in (1, 2, 3, 7):
            torch.set_num_threads(n)
            other = run(packed, prefix, ray_offsets=offsets)
            assert all(torch.equal(x, other[name]) for name, x in whole.items())
            for r in range(0, 40, n):
                a, b = int(offsets[r]), int(offsets[r + 1])
                dense = [x[r : r + 1, : b - a] for x in rays]
                out = render(*dense, background=back, prefix_trans=prefix[r : r + 1], return_weights=True,
                             distortion=True, backend=backend, **options)
                assert all(torch.equal(getattr(out, k)[0], whole[k][r]) for k in by_ray)
                assert torch.equal(out.weights[0], whole["weights"][a:b])
    finally:
        torch.set_num_threads(threads)


@needs_native
def test_gradients_do_not_depend_on_the_batch():
    rays, prefix = scene(9, 50, 3, torch.float32), torch.rand(9)
    names = ("features", "depth", "opacity", "weights", "distortion")

    def gradients(part):
        inputs = [x[part].detach().requires_grad_() for x in rays]
        out = render(*inputs, prefix_trans=prefix[part], return_weights=True, distortion=True, backend="cpu")
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


@pytest.mark.parametrize("backend", BACKENDS)
def test_out(backend):
    rays = scene(4, 20, 3, torch.float32)
    wide = torch.full((4, 5), NAN)
    out = onepass.Rendering(wide[:, 1:4], torch.empty(4), torch.empty(4), torch.empty(4, 20), None)
    got = render(*rays, out=out, return_weights=True, backend=backend)
    expected = render(*rays, return_weights=True, backend=backend)
    assert got.features.data_ptr() == wide[:, 1:4].data_ptr() and wide[:, [0, 4]].isnan().all()
    assert all(torch.equal(a, b) for a, b in zip(out[:4], expected[:4], strict=True)) and got.distortion is None


# ---- torch.library, compile, transforms ----


@pytest.mark.parametrize("backend", BACKENDS)
def test_library_op(backend):
    density, features, t0, t1 = (x.requires_grad_() for x in scene(3, 5, 2, torch.float32))
    args = (density, features, t0, t1, None, None, torch.rand(2), torch.rand(3), 0.1, "expected")
    torch.library.opcheck(torch.ops.onepass.composite.default, (*args, True, True), {"backend": backend})
    flat = [x.detach().flatten(0, 1) for x in (density, features, t0, t1)]
    args = (None, *flat[1:], flat[0] / 3, torch.tensor([0, 7, 15]), None, None, 0.0, "normalized")
    torch.library.opcheck(torch.ops.onepass.composite.default, (*args, False, False), {"backend": backend})
    grads = (torch.rand(2, 2), torch.rand(2), None, torch.rand(15), None)
    needs = [False, True, True, False, True, False, False]
    torch.library.opcheck(torch.ops.onepass.composite_backward.default, (*grads, *args, needs), {"backend": backend})


def test_compile_fake_make_fx_vmap_autocast():
    torch._dynamo.reset()
    rays = scene(3, 5, 2, torch.float32)

    def f(*x):
        out = onepass.composite(*x, return_weights=True, distortion=True)
        return out.features.sum() + (out.depth * out.opacity).sum() + out.weights.square().sum() + out.distortion.sum()

    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(f, fullgraph=True, backend=counter)
    for seed in (0, 1):
        a, b = ([x.requires_grad_() for x in scene(3, 5, 2, torch.float32, seed)] for _ in range(2))
        compiled(*a).backward()
        f(*b).backward()
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x.grad, y.grad)
    assert counter.frame_count == 1

    with torch._subclasses.FakeTensorMode():
        z = torch.empty(3, 5)
        out = onepass.composite(z, torch.empty(3, 5, 2), z, z, distortion=True)
        assert out.features.shape == (3, 2) and out.distortion.shape == (3,) and out.weights is None
    traced = torch.fx.experimental.proxy_tensor.make_fx(f)(*rays)
    torch.testing.assert_close(traced(*rays), f(*rays))
    with torch.autocast("cpu", torch.bfloat16):
        assert f(*rays).dtype == torch.float32
    scenes = [torch.stack(x) for x in zip(rays, scene(3, 5, 2, torch.float32, 7), strict=True)]
    torch.testing.assert_close(torch.func.vmap(f)(*scenes)[0], f(*rays))


def test_compiles_with_inductor():
    torch._dynamo.reset()
    rays = scene(3, 5, 2, torch.float32)
    f = torch.compile(lambda *x: onepass.composite(*x, background=torch.ones(2)).features.sin(), fullgraph=True)
    torch.testing.assert_close(f(*rays), onepass.composite(*rays, background=torch.ones(2)).features.sin())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("offsets", "text"), [
    ([1, 6], "ray_offsets runs from 1 to 6, expected 0 to the number of samples, 6"),
    ([0, 5], "ray_offsets runs from 0 to 5, expected 0"),
    ([0, 2**62, 6], "ray_offsets falls from 4611686018427387904 to 6 at ray 1"),
    ([0, 4, 3, 6], "ray_offsets falls from 4 to 3 at ray 1, expected ascending values"),
])
def test_bad_offsets(offsets, text, backend):
    z = torch.zeros(6)
    with pytest.raises(ValueError, match=text):
        onepass.composite(z, torch.zeros(6, 3), z, z, ray_offsets=torch.tensor(offsets), backend=backend)


@pytest.mark.parametrize(("change", "error", "text"), [
    ({"sigmas": None}, ValueError, "sigmas and alphas: neither is given, expected exactly one"),
    ({"alphas": torch.zeros(2, 3)}, ValueError, "sigmas and alphas: both are given"),
    ({"sigmas": torch.zeros(6)}, ValueError, r"sigmas has shape \(6,\), expected \(n_rays, n_samples\)"),
    ({"sigmas": torch.zeros(2, 3).long()}, TypeError, "sigmas has dtype torch.int64, expected float32"),
    ({"features": torch.zeros(2, 3)}, ValueError, r"features has shape \(2, 3\), expected that of sigmas and channels"),
    ({"t_starts": torch.zeros(3)}, ValueError, r"t_starts has shape \(3,\), expected that of sigmas"),
    ({"t_ends": torch.zeros(2, 3).half()}, TypeError, "t_ends has dtype torch.float16, expected that of t_starts"),
    ({"background": torch.zeros(3)}, ValueError, r"background has shape \(3,\), expected \(4,\) or \(2, 4\)"),
    ({"prefix_trans": torch.zeros(3)}, ValueError, r"prefix_trans has shape \(3,\), expected \(2,\)"),
    ({"ray_offsets": torch.zeros(3).long()}, ValueError, r"sigmas has shape \(2, 3\), expected \(total,\)"),
    ({"early_stop_eps": -0.1}, ValueError, "early_stop_eps=-0.1: expected 0 <= early_stop_eps <= 1"),
    ({"depth": "mean"}, ValueError, "depth='mean': expected one of expected, normalized, median"),
    ({"out": torch.zeros(2, 4)}, TypeError, "out is Tensor, expected a Rendering or a tuple of its 5 tensors"),
    ({"out": (None, None, None, torch.zeros(2, 3), None)}, ValueError, "out.weights is given, expected None"),
    ({"out": (None, torch.zeros(3), None, None, None)}, ValueError, r"out.depth has shape \(3,\), expected \(2,\)"),
    ({"backend": "triton"}, ValueError, "composite has no triton kernel"),
    ({"sigmas": torch.zeros(2, 3).double(), "backend": "cpu"}, ValueError, "dtype is torch.float64, the kernel takes"),
])
def test_bad_input(change, error, text):
    z = torch.zeros(2, 3)
    with pytest.raises(error, match=text):
        onepass.composite(**{"sigmas": z, "features": torch.zeros(2, 3, 4), "t_starts": z, "t_ends": z, **change})
