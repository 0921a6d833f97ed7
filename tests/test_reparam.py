"""reparameterize and its KL: against torch.distributions, float64 and gradcheck, on every backend."""
import itertools
import math

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st

import onepass
from onepass.reference import reparam as reference

import cases
from helpers import (
    ALL_BACKENDS,
    INTERPRETED,
    ISAS,
    KERNELS,
    assert_as_good_as_torch,
    device_of,
    needs_native,
    run_python,
)

KEY = (0, None, 0, None, 0, None)


def inputs(shape, dtype=torch.float32, seed=0, device="cpu"):
    g = torch.Generator().manual_seed(seed)
    return [(scale * torch.randn(shape, generator=g)).to(device, dtype) for scale in (1, 1.5, 1)]


def plain(mean, logvar, noise):
    """What a VAE's author writes."""
    return mean + torch.exp(0.5 * logvar) * noise


def plain_kl(mean, logvar):
    elements = 0.5 * (logvar.exp() + mean**2 - 1 - logvar)
    return elements.sum(tuple(range(1, elements.dim()))) if elements.dim() > 1 else elements


def test_reference_against_torch_distributions():
    mean, logvar, noise = inputs((6, 5, 7), torch.float64)
    z, kl = reference.reparameterize(mean, logvar, noise, *KEY, True)
    posterior = torch.distributions.Normal(mean, (0.5 * logvar).exp())
    prior = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
    torch.testing.assert_close(kl, torch.distributions.kl_divergence(posterior, prior).sum((1, 2)))
    torch.testing.assert_close((z - mean) / posterior.stddev, noise)


@pytest.mark.parametrize("kl", [False, True])
@pytest.mark.parametrize("keys", [KEY, (0, torch.arange(3), 5, None, 0, None)])
def test_reference_gradcheck(kl, keys):
    mean, logvar, noise = (x.requires_grad_() for x in inputs((3, 2, 5), torch.float64))
    assert torch.autograd.gradcheck(lambda m, v: reference.reparameterize(m, v, None, *keys, kl), (mean, logvar))
    assert torch.autograd.gradcheck(
        lambda *t: onepass.reparameterize_kl(t[0], t[1], noise=t[2], backend="reference"), (mean, logvar, noise)
    )


def values_and_gradients(shape, dtype, device, backend, draw):
    """z, KL and the three gradients: of the backend, of PyTorch in the same dtype, of float64."""
    g = torch.Generator().manual_seed(1000 + draw)
    given = inputs(shape, dtype, seed=draw)
    grads = torch.randn(shape, generator=g).to(dtype), torch.rand(shape[0], generator=g)

    def own(where, wide):
        leaves = [x.detach().to(where, wide).requires_grad_() for x in given]
        z, kl = plain(*leaves), plain_kl(*leaves[:2])
        torch.autograd.backward((z, kl), [x.to(where, z.dtype) for x in grads])
        return [x.detach().cpu() for x in (z, kl, *(leaf.grad for leaf in leaves))]

    leaves = [x.to(device).requires_grad_() for x in given]
    z, kl = onepass.reparameterize_kl(leaves[0], leaves[1], noise=leaves[2], backend=backend)
    assert z.dtype == dtype and kl.dtype == torch.float32 and z.is_contiguous()
    torch.autograd.backward((z, kl), [x.to(device) for x in grads])
    got = [x.detach().cpu() for x in (z, kl, *(leaf.grad for leaf in leaves))]
    same, truth = own(device, dtype), own("cpu", torch.float64)
    same[1] = same[1].float()
    return got, same, truth


def assert_values_and_gradients(shape, dtype, device, backend):
    """The rule compares the largest errors; of few numbers these are luck, so a small shape is drawn many times."""
    count = 40 if 0 < math.prod(shape) < 100 else 1
    draws = [values_and_gradients(shape, dtype, device, backend, draw) for draw in range(count)]
    for i, name in enumerate(("z", "kl", "mean", "logvar", "noise")):
        got, same, truth = (torch.stack([draw[which][i] for draw in draws]) for which in range(3))
        assert_as_good_as_torch(got, same, truth, name)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("dtype", cases.FLOATS)
@pytest.mark.parametrize("shape", cases.SHAPES)
def test_values_and_gradients(shape, dtype, backend):
    assert_values_and_gradients(shape, dtype, device_of(backend), backend)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("shape", [(5, 1031), (70, 6), (3, 2056)])
@pytest.mark.parametrize("keys", [{"seed": 7, "stream": 3, "offset": 5}, {"seed": "by row", "stream": 9}])
def test_the_noise_is_the_keys_own_and_backward_replays_it(keys, shape, backend):
    device = device_of(backend)
    mean, logvar, _ = (x.requires_grad_() for x in inputs(shape, device=device))
    if keys["seed"] == "by row":
        keys = {**keys, "seed": torch.arange(shape[0], device=device) - 2}
    z, kl = onepass.reparameterize_kl(mean, logvar, **keys, backend=backend)
    noise = onepass.rng.normal(
        shape, **{**keys, "stream": keys["stream"] + (1 << 56)}, device=device, backend="reference"
    )
    torch.testing.assert_close(z, plain(mean, logvar, noise))
    assert torch.equal(onepass.reparameterize(mean, logvar, **keys, backend=backend), z)
    grad = torch.randn(shape).to(device)
    got = torch.autograd.grad((z, kl.sum()), (mean, logvar), (grad, torch.tensor(0.3, device=device)))
    expected = torch.autograd.grad((plain(mean, logvar, noise), plain_kl(mean, logvar).sum()), (mean, logvar),
                                   (grad, torch.tensor(0.3, device=device)))
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("backend", KERNELS)
@settings(deadline=None, max_examples=15 if INTERPRETED else 40)
@given(data=st.data())
def test_views_and_strides(backend, data):
    """Chunks of one tensor, permuted dims, expanded and offset views: the values of their contiguous copies."""
    shape = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    order = data.draw(st.permutations(range(len(shape))))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    base = torch.randn([2, *(s + data.draw(st.integers(0, 3)) for s in shape)], generator=g).to(device_of(backend))
    crop = tuple(slice(b - s, b) for s, b in zip(shape, base.shape[1:], strict=True))
    mean, logvar = (base[i][crop].permute(order) for i in (0, 1))
    got = onepass.reparameterize_kl(mean, logvar, seed=3, backend=backend)
    expected = onepass.reparameterize_kl(mean.contiguous(), logvar.contiguous(), seed=3, backend=backend)
    assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_a_chunked_tensor(backend):
    parameters = torch.randn(3, 8, 6, 6).to(device_of(backend))
    mean, logvar = parameters.chunk(2, dim=1)
    torch.testing.assert_close(
        onepass.reparameterize(mean, logvar, seed=1, backend=backend),
        onepass.reparameterize(mean.contiguous(), logvar.contiguous(), seed=1, backend="reference"),
    )


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_rows_do_not_depend_on_the_batch_or_the_threads(backend):
    for shape in ((6, 3, 4099), (6, 40), (6, 5), (200, 12)):
        mean, logvar, _ = inputs(shape, device=device_of(backend))
        seeds = torch.arange(shape[0], device=mean.device) + 2**33
        run = lambda m, v, s: onepass.reparameterize_kl(m, v, seed=s, backend=backend)
        z, kl = run(mean, logvar, seeds)
        assert all(map(torch.equal, run(mean, logvar, seeds), (z, kl)))
        threads = torch.get_num_threads()
        try:
            for n in (1, 2, 3) if backend == "cpu" else (threads,):
                torch.set_num_threads(n)
                for b in range(0, shape[0], 1 + shape[0] // 20):
                    z1, kl1 = run(mean[b : b + 1], logvar[b : b + 1], seeds[b : b + 1])
                    assert torch.equal(z1[0], z[b]) and torch.equal(kl1[0], kl[b])
        finally:
            torch.set_num_threads(threads)


@needs_native
@pytest.mark.parametrize("dtype", cases.FLOATS)
@pytest.mark.parametrize("length", [1, 3, 8, 16, 21, 1000, 4096])
def test_short_rows_have_the_same_bits_together_apart_and_alone(length, dtype):
    """Rows that lie one behind the other are worked on as one run; views of a wider tensor are not."""
    rows = 2 + 9000 // length
    g = torch.Generator().manual_seed(length)
    wide = torch.randn(4, rows, length + 3, generator=g).to(dtype)
    on_kl = torch.rand(rows, generator=g)

    def run(mean, logvar, noise, grad_z, grad_kl):
        leaves = [x.detach().requires_grad_() for x in (mean, logvar, noise)]
        z, kl = onepass.reparameterize_kl(leaves[0], leaves[1], noise=leaves[2], backend="cpu")
        return z, kl, *torch.autograd.grad((z, kl), leaves, (grad_z, grad_kl))

    views = wide[:, :, 2 : length + 2]
    apart = run(*views, on_kl)
    together = run(*views.contiguous(), on_kl)
    mixed = run(views[0].contiguous(), *views[1:], on_kl)
    assert all(map(torch.equal, apart, together)) and all(map(torch.equal, mixed, together))
    for row in (0, 1, rows // 2, rows - 1):
        alone = run(*(x[row : row + 1] for x in views), on_kl[row : row + 1])
        assert all(torch.equal(a[0], b[row]) for a, b in zip(alone, together, strict=True))


ISA_CODE = """
import torch, onepass
from onepass import _native
assert _native._C.isa == {isa!r}
g = torch.Generator().manual_seed(0)
mean, logvar, noise = (torch.randn(3, 1037, generator=g) for _ in range(3))
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    m, v, n = (x.to(dtype).requires_grad_() for x in (mean, logvar, noise))
    results = []
    for backend in ("cpu", "reference"):
        for given in ({{"noise": n}}, {{"seed": 3}}):
            z, kl = onepass.reparameterize_kl(m, v, **given, backend=backend)
            results.append((z, kl, *torch.autograd.grad((z.float().sum() + kl.sum()), (m, v))))
    for a, b in ((results[0], results[2]), (results[1], results[3])):
        torch.testing.assert_close(a, b)
print("ok")
"""


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa):
    assert run_python(ISA_CODE.format(isa=isa), ONEPASS_CPU_ISA=isa).strip() == "ok"


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_extreme_values_go_where_plain_torch_sends_them(backend):
    mean = torch.tensor([[0.0, 1e30, -1e30, 0.0, math.inf, math.nan, 1.0, 1.0]])
    logvar = torch.tensor([[-math.inf, -200.0, 170.0, 88.0, 0.0, 0.0, math.nan, -104.0]])
    mean, logvar, noise = (x.to(device_of(backend)) for x in (mean, logvar, torch.ones(1, 8)))
    z = onepass.reparameterize(mean, logvar, noise=noise, backend=backend)
    torch.testing.assert_close(z, plain(mean, logvar, noise), equal_nan=True)


DEVIATIONS_CODE = """
import torch, onepass
logvar = torch.cat((torch.linspace(-215, 177.4, 4001), torch.tensor([-1e30, -torch.inf, -0.0, 0.0])))[None]
for clamp in (None, (None, 200.0)):         # with options the kernel is another
    z = onepass.reparameterize(torch.zeros_like(logvar), logvar, noise=torch.ones_like(logvar), clamp=clamp)
    torch.testing.assert_close(z.double(), (0.5 * logvar.double()).exp(), rtol=2.4e-7, atol=1.5e-45)
    assert (z[0, -2:] == 1).all() and (z[0, -4:-2] == 0).all()
print("ok")
"""


@pytest.mark.parametrize("isa", ISAS)
def test_deviations_of_every_size_are_near(isa):
    assert run_python(DEVIATIONS_CODE, ONEPASS_CPU_ISA=isa).strip() == "ok"


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_out_and_reductions(backend):
    mean, logvar, noise = inputs((4, 33), device=device_of(backend))
    out = torch.full((4, 40), math.nan, device=mean.device)
    z, kl = onepass.reparameterize_kl(mean, logvar, noise=noise, out=out[:, 5:38], backend=backend)
    assert z.data_ptr() == out[:, 5:38].data_ptr() and out[:, :5].isnan().all() and out[:, 38:].isnan().all()
    torch.testing.assert_close(z, plain(mean, logvar, noise))
    for reduction, expected in (("sum", kl.sum()), ("mean", kl.mean())):
        got = onepass.reparameterize_kl(mean, logvar, noise=noise, reduction=reduction, backend=backend)[1]
        assert torch.equal(got, expected)


@needs_native
def test_forward_saves_nothing_but_its_inputs():
    mean, logvar, _ = (x.requires_grad_() for x in inputs((4, 4096)))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        onepass.reparameterize_kl(mean, logvar, seed=1)
    assert {x.data_ptr() for x in saved} == {mean.data_ptr(), logvar.data_ptr()}


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_library_op(backend):
    device = device_of(backend)
    mean, logvar, noise = (x.requires_grad_() for x in inputs((3, 7), device=device))
    for fixed, kl in itertools.product((noise, None), (True, False)):
        key = (0, torch.arange(3, device=device), 2, None, 0, None)
        args = (mean, logvar, fixed, *key, kl)
        torch.library.opcheck(torch.ops.onepass.reparameterize.default, args, {"backend": backend})
        grads = (torch.randn(3, 7).to(device), torch.randn(3).to(device) if kl else None)
        noise_in = None if fixed is None else fixed.detach()
        args = (*grads, mean.detach(), logvar.detach(), noise_in, *key, fixed is not None)
        torch.library.opcheck(torch.ops.onepass.reparameterize_backward.default, args, {"backend": backend})


def test_compile_fake_make_fx_vmap_autocast():
    torch._dynamo.reset()
    mean, logvar, noise = inputs((3, 7))

    def f(m, v, n, s):
        z, kl = onepass.reparameterize_kl(m, v, seed=s)
        return (z * onepass.reparameterize(m, v, noise=n)).sum() + kl.sum()

    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(f, fullgraph=True, backend=counter)
    for seed in (torch.tensor(1), torch.tensor(2)):
        leaves = [x.clone().requires_grad_() for x in (mean, logvar, noise)]
        again = [x.clone().requires_grad_() for x in (mean, logvar, noise)]
        compiled(*leaves, seed).backward()
        f(*again, seed).backward()
        for a, b in zip(leaves, again, strict=True):
            torch.testing.assert_close(a.grad, b.grad)
    assert counter.frame_count == 1

    with torch._subclasses.FakeTensorMode():
        z, kl = onepass.reparameterize_kl(torch.empty(3, 7), torch.empty(3, 7), seed=1)
        assert z.shape == (3, 7) and kl.shape == (3,)
    traced = torch.fx.experimental.proxy_tensor.make_fx(f)(mean, logvar, noise, torch.tensor(4))
    torch.testing.assert_close(traced(mean, logvar, noise, torch.tensor(4)), f(mean, logvar, noise, torch.tensor(4)))
    run = lambda m, v, n: onepass.reparameterize(m, v, noise=n)
    torch.testing.assert_close(torch.func.vmap(run)(mean, logvar, noise), run(mean, logvar, noise))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(run(mean, logvar, noise), run(mean, logvar, noise))
        assert run(mean, logvar, noise).dtype == torch.float32


def test_compiles_with_inductor():
    torch._dynamo.reset()
    mean, logvar, _ = inputs((3, 7))
    f = torch.compile(lambda m, v: onepass.reparameterize(m, v, seed=5).sin(), fullgraph=True)
    torch.testing.assert_close(f(mean, logvar), onepass.reparameterize(mean, logvar, seed=5).sin())


@pytest.mark.parametrize(("change", "error", "text"), [
    ({"mean": 3}, TypeError, "mean is int, expected a tensor"),
    ({"mean": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "mean has dtype torch.int64, expected float32"),
    ({"logvar": torch.zeros(3)}, ValueError, r"logvar has shape \(3,\), expected that of mean, \(2, 3\)"),
    ({"logvar": torch.zeros(2, 3).half()}, TypeError, "logvar has dtype torch.float16, expected that of mean"),
    ({"noise": torch.zeros(2, 4)}, ValueError, r"noise has shape \(2, 4\)"),
    ({"noise": torch.zeros(2, 3), "seed": 1}, ValueError, "noise and seed are both given"),
    ({"seed": torch.arange(3)}, ValueError, r"seed has shape \(3,\), expected \(\) or \(2,\)"),
    ({"stream": 2**56}, ValueError, r"stream=72057594037927936: expected 0 <= stream < 2\*\*56"),
    ({"out": torch.zeros(2, 3).half()}, TypeError, "out has dtype torch.float16, expected torch.float32"),
    ({"reduction": "all"}, ValueError, "reduction='all': expected one of row, sum, mean"),
    pytest.param({"backend": "triton"}, ValueError, "backend='triton' cannot take this call: .* (installed|on cpu)",
                 marks=pytest.mark.skipif(INTERPRETED, reason="the interpreter takes CPU tensors")),
    ({"mean": torch.zeros(2, 3).double(), "logvar": torch.zeros(2, 3).double(), "backend": "cpu"}, ValueError,
     "dtype is torch.float64, the kernel takes"),
])
def test_bad_input(change, error, text):
    with pytest.raises(error, match=text):
        onepass.reparameterize_kl(**{"mean": torch.zeros(2, 3), "logvar": torch.zeros(2, 3), **change})
