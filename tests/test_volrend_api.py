"""composite under torch.library, torch.compile and transforms, and what it refuses."""
import pytest
import torch
import torch._dynamo.testing

import onepass

from helpers import ALL_BACKENDS, BACKENDS, INTERPRETED
from volrend_rays import scene

pytestmark = pytest.mark.usefixtures("on_its_device")

# ---- torch.library, compile, transforms ----


@pytest.mark.parametrize("backend", ALL_BACKENDS)
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
    pytest.param({"backend": "triton"}, ValueError, "backend='triton' cannot take this call: .* (installed|on cpu)",
                 marks=pytest.mark.skipif(INTERPRETED, reason="the interpreter takes CPU tensors")),
    ({"sigmas": torch.zeros(2, 3).double(), "backend": "cpu"}, ValueError, "dtype is torch.float64, the kernel takes"),
])
def test_bad_input(change, error, text):
    z = torch.zeros(2, 3)
    with pytest.raises(error, match=text):
        onepass.composite(**{"sigmas": z, "features": torch.zeros(2, 3, 4), "t_starts": z, "t_ends": z, **change})
