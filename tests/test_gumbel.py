"""gumbel_softmax: against its formula, torch's own, float64 and gradcheck."""
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import onepass
from onepass import rng

import cases
from helpers import ALL_BACKENDS as BACKENDS
from helpers import (
    INTERPRETED,
    ISAS,
    TRITON,
    assert_as_good_as_torch,
    run_python,
)

pytestmark = pytest.mark.usefixtures("on_its_device")

TAG = 6 << 56


def noise(shape, seed=3, stream=0):
    """On the test's device; the numbers are the same on each."""
    drawn = rng.gumbel(shape, seed=seed, stream=TAG + stream, dtype=torch.float32, device="cpu", backend="reference")
    return drawn.to(torch.get_default_device())


def randn(shape, generator):
    return torch.randn(shape, generator=generator, device="cpu").to(torch.get_default_device())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", cases.FLOATS)
@pytest.mark.parametrize("shape", [(45,), (9, 7), (3, 4, 16), (2, 1000), (2, 3, 2049)])
@pytest.mark.parametrize("tau", [1.0, 0.3])
def test_values_and_gradients(shape, dtype, tau, backend):
    g = torch.Generator().manual_seed(0)
    logits, on = (randn(shape, g).to(dtype) for _ in range(2))

    def plain(wide):
        x = logits.to(wide).requires_grad_()
        y = ((x + noise(shape).to(wide)) / tau).softmax(-1)
        return y, torch.autograd.grad(y, x, on.to(wide))[0]

    x = logits.clone().requires_grad_()
    y = onepass.gumbel_softmax(x, tau, seed=3, backend=backend)
    assert y.dtype == dtype
    got = y, torch.autograd.grad(y, x, on)[0]
    for name, a, b, c in zip(("sample", "gradient"), got, plain(dtype), plain(torch.float64), strict=True):
        assert_as_good_as_torch(a, b, c, name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", cases.FLOATS)
def test_hard_is_exactly_one_hot_with_the_soft_gradient(dtype, backend):
    g = torch.Generator().manual_seed(1)
    logits, on = (randn((40, 33), g).to(dtype) for _ in range(2))
    x, twin = (logits.clone().requires_grad_() for _ in range(2))
    hard = onepass.gumbel_softmax(x, 0.5, hard=True, seed=3, backend=backend)
    soft = onepass.gumbel_softmax(twin, 0.5, seed=3, backend=backend)
    assert torch.equal(hard.sort(-1).values, torch.eye(33, dtype=dtype)[-1].expand(40, 33))
    assert torch.equal(hard.argmax(-1), (logits.float() + noise((40, 33))).argmax(-1))
    assert torch.equal(*(torch.autograd.grad(y, leaf, on)[0] for y, leaf in ((hard, x), (soft, twin))))


@pytest.mark.parametrize("backend", [TRITON])
@pytest.mark.parametrize(("n", "seed"), [(260, [5, -1, 2**40]), (129, 3)])
def test_rows_of_several_tiles_give_what_a_row_of_one_gives(n, seed, backend, monkeypatch):
    from onepass.kernels import gumbel

    g = torch.Generator().manual_seed(n)
    logits, on = randn((3, 2, n), g), randn((3, 2, n), g)
    logits[0, 0, :128] = -math.inf                                      # a tile of nothing
    logits[0, 1], logits[1, 0, 70], logits[1, 1, n - 1] = -math.inf, math.nan, math.inf
    seed = torch.tensor(seed)

    def run(hard=False):
        x = logits.clone().requires_grad_(not hard)
        y = onepass.gumbel_softmax(x, 0.5, hard, seed=seed, backend=backend)
        return (y,) if hard else (y, torch.autograd.grad(y, x, on)[0])

    whole = *run(), *run(hard=True)
    monkeypatch.setattr(gumbel, "_WHOLE_ROW", 32)
    monkeypatch.setattr(gumbel, "_LONG", 32)
    cut = *run(), *run(hard=True)
    torch.testing.assert_close(cut, whole, equal_nan=True)
    assert torch.equal(cut[2], whole[2])
    if seed.dim():
        alone = onepass.gumbel_softmax(logits[2:], 0.5, seed=seed[2:], backend=backend)
        assert torch.equal(alone[0], cut[0][2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_types_stay_finite_where_torchs_do_not(backend):
    logits = torch.zeros(20 if INTERPRETED else 200, 500, dtype=torch.float16)
    y = onepass.gumbel_softmax(logits, 0.05, seed=1, backend=backend)
    assert y.isfinite().all()
    torch.testing.assert_close(y.float().sum(-1), torch.ones(len(logits)), rtol=2e-3, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_and_bad_logits_go_where_torch_sends_them(backend):
    inf, nan = math.inf, math.nan
    logits = torch.tensor([[0.0, -inf, 1.0], [inf, 0.0, 0.0], [-inf, -inf, -inf], [nan, 0.0, 0.0], [3e38, 3e38, 0.0]])
    y = onepass.gumbel_softmax(logits, seed=3, backend=backend)
    torch.testing.assert_close(y, (logits + noise((5, 3))).softmax(-1), equal_nan=True)
    assert y[0, 1] == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_categories_are_drawn_as_often_as_their_probability(backend):
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    n = 2_000 if INTERPRETED else 100_000
    counts = onepass.gumbel_softmax(p.log().expand(n, 4), hard=True, seed=11, backend=backend).sum(0)
    chi_square = ((counts - n * p) ** 2 / (n * p)).sum()
    assert chi_square < 27.9                # exceeded with a chance of 4e-6 at 3 degrees of freedom


@pytest.mark.parametrize("backend", BACKENDS)
def test_dims_rows_and_keys(backend):
    logits = torch.randn(4, 5, 6)
    for dim in (0, 1, -2):
        moved = onepass.gumbel_softmax(logits.movedim(dim, -1), seed=2, stream=5, backend=backend).movedim(-1, dim)
        assert torch.equal(onepass.gumbel_softmax(logits, dim=dim, seed=2, stream=5, backend=backend), moved)
        torch.testing.assert_close(moved.sum(dim), torch.ones_like(moved.sum(dim)))
    seeds = torch.tensor([9, -4, 2**40, 0])
    whole = onepass.gumbel_softmax(logits, seed=seeds, backend=backend)
    for b in range(4):
        alone = onepass.gumbel_softmax(logits[b : b + 1], seed=seeds[b : b + 1], backend=backend)
        assert torch.equal(alone[0], whole[b])
    assert torch.equal(onepass.gumbel_softmax(logits, generator=rng.Generator(8, 4), backend=backend),
                       onepass.gumbel_softmax(logits, seed=8, stream=4, backend=backend))
    out = torch.full((4, 5, 12), math.nan)[..., ::2]
    got = onepass.gumbel_softmax(logits, seed=seeds, out=out, backend=backend)
    assert got.data_ptr() == out.data_ptr() and torch.equal(out, whole)
    for shape in ((0, 3), (3, 0)):
        assert onepass.gumbel_softmax(torch.zeros(shape), seed=1, backend=backend).shape == shape


@settings(deadline=None, max_examples=30)
@given(shape=st.lists(st.integers(1, 40), min_size=1, max_size=3), threads=st.sampled_from([1, 2, 3]))
def test_threads_and_shapes(shape, threads):
    logits = torch.randn(shape)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        got = onepass.gumbel_softmax(logits, seed=3)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(got, onepass.gumbel_softmax(logits, seed=3, backend="reference"))


def test_signature_is_torchs_and_the_law_too():
    logits = torch.randn(3, 4)
    for args in ((), (0.5,), (0.5, True), (0.5, True, -1)):
        assert onepass.gumbel_softmax(logits, *args).shape == logits.shape
    ours = onepass.gumbel_softmax(torch.zeros(20_000, 3), 2.0, seed=1)
    torch.manual_seed(0)
    theirs = F.gumbel_softmax(torch.zeros(20_000, 3), 2.0)
    assert (ours.std(0) - theirs.std(0)).abs().max() < 0.01 and (ours.mean(0) - theirs.mean(0)).abs().max() < 0.01


def test_reference_gradcheck():
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: onepass.gumbel_softmax(x, 0.7, seed=3), x)


@pytest.mark.parametrize("backend", BACKENDS)
def test_library_op(backend):
    x = torch.randn(3, 5, requires_grad=True)
    for hard in (False, True):
        args = (x, 3, None, 0, None, 0, None, 0.7, hard)
        torch.library.opcheck(torch.ops.onepass.gumbel_softmax.default, args, {"backend": backend})
    torch._dynamo.reset()
    f = lambda x: onepass.gumbel_softmax(x, seed=3, dim=0).sin()
    assert torch.equal(torch.compile(f, fullgraph=True, backend="aot_eager")(x), f(x))


ISA_CODE = """
import torch, onepass
from onepass import _native
assert _native._C.isa == {isa!r}
x = torch.randn(5, 77, generator=torch.Generator().manual_seed(0), requires_grad=True)
both = [onepass.gumbel_softmax(x, 0.5, seed=3, backend=b) for b in ("cpu", "reference")]
torch.testing.assert_close(*both)
torch.testing.assert_close(*(torch.autograd.grad(y.sin().sum(), x)[0] for y in both))
print("ok")
"""


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa):
    assert run_python(ISA_CODE.format(isa=isa), ONEPASS_CPU_ISA=isa).strip() == "ok"


@pytest.mark.parametrize(("change", "error", "text"), [
    ({"logits": 3}, TypeError, "logits is int, expected a tensor"),
    ({"logits": torch.zeros(3, dtype=torch.int64)}, TypeError, "logits has dtype torch.int64"),
    ({"tau": 0}, ValueError, "tau=0: expected a finite number above 0"),
    ({"tau": math.nan}, ValueError, "tau=nan: expected a finite number above 0"),
    ({"dim": 2}, ValueError, "dim=2: expected a dim of logits, which has 2"),
    ({"logits": torch.tensor(1.0)}, ValueError, "dim=-1: expected a dim of logits, which has 0"),
    ({"seed": 1, "generator": rng.Generator(1)}, ValueError, "seed and generator are both given"),
    ({"out": torch.zeros(3)}, ValueError, r"out has shape \(3,\), expected \(2, 3\)"),
    ({"backend": "cuda"}, ValueError, "a tensor is on cpu, the kernel reads device memory"),
])
def test_bad_input(change, error, text):
    with pytest.raises(error, match=text):
        onepass.gumbel_softmax(**{"logits": torch.zeros(2, 3), **change})
