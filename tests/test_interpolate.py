"""lerp and slerp: exact ends, angles that grow evenly, vectors that have no angle; gradients in every regime."""
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import onepass
from onepass.reference import interpolate as reference

import cases
from helpers import ALL_BACKENDS as BACKENDS
from helpers import ISAS, KERNELS, TRITON, assert_as_good_as_torch, run_python

pytestmark = pytest.mark.usefixtures("on_its_device")
FUNCTIONS = [onepass.lerp, onepass.slerp]


def randn(shape, seed=0, dtype=torch.float32):
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed), device="cpu")
    return drawn.to(torch.get_default_device(), dtype)


def pair(shape, dtype=torch.float32):
    return [randn(shape, seed, dtype) for seed in (0, 1)]


def angle(a, b):
    cosine = torch.nn.functional.cosine_similarity(a.double().flatten(1), b.double().flatten(1))
    return torch.acos(cosine.clamp(-1, 1))


def plain(function, a, b, t):
    """The formulas as people write them, in the type of their operands."""
    t = t.reshape(-1, *(1,) * (a.dim() - 1)).to(a.dtype)
    if function is onepass.lerp:
        return (1 - t) * a + t * b
    dims = list(range(1, a.dim()))
    norm = lambda x: torch.linalg.vector_norm(x, dim=dims, keepdim=True)
    w = torch.acos((a / norm(a) * (b / norm(b))).sum(dims, keepdim=True))
    return (torch.sin((1 - t) * w) * a + torch.sin(t * w) * b) / torch.sin(w)


def with_gradients(function, a, b, t, on, **options):
    leaves = [x.detach().clone().requires_grad_() for x in (a, b, t)]
    result = function(*leaves, **options)
    return result.detach(), *torch.autograd.grad(result, leaves, on.to(result.dtype))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", cases.FLOATS)
@pytest.mark.parametrize("shape", cases.PATHS)
def test_values_and_gradients(shape, dtype, function, backend):
    """Against float64, with the error that the formula has in the type of the operands."""
    a, b, on = *pair(shape, dtype), randn(shape, 2, dtype)
    t = torch.linspace(0.1, 0.8, shape[0])
    got = with_gradients(function, a, b, t, on, backend=backend)
    formula = lambda *x: plain(function, *x)
    same = with_gradients(formula, a, b, t, on)
    truth = with_gradients(formula, *(x.double() for x in (a, b, t, on)))
    assert got[0].dtype == dtype and got[3].dtype == torch.float32
    for name, x, y, z in zip(("path", "start's", "end's", "weight's"), got, same, truth, strict=True):
        assert_as_good_as_torch(x, y, z, name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", [*cases.FLOATS, torch.float64])
def test_ends_are_exact_and_rows_have_weights_of_their_own(function, dtype, backend):
    if dtype == torch.float64 and backend != "reference":
        pytest.skip("no kernel takes float64: it is computed by the reference")
    a, b = pair((5, 3, 4), dtype)
    run = lambda a, b, t: function(a, b, t, backend=backend)
    assert torch.equal(run(a, b, 0.0), a) and torch.equal(run(a, b, 1), b)
    weights = torch.tensor([0.0, 1.0, 0.25, 0.5, 0.9])
    path = run(a, b, weights)
    assert path.dtype == dtype and torch.equal(path[0], a[0]) and torch.equal(path[1], b[1])
    for i in range(5):
        assert torch.equal(run(a[i : i + 1], b[i : i + 1], weights[i].item())[0], path[i])
        assert torch.equal(run(a[i : i + 1], b[i : i + 1], weights[i : i + 1])[0], path[i])
    assert torch.equal(run(a[0], b[0], 0.3), run(a[0], b[0], torch.tensor(0.3, dtype=torch.float64)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_an_end_reads_nothing_else_and_takes_the_whole_gradient(function, backend):
    a, b = pair((2, 9))
    lost = torch.full_like(a, math.nan)
    run = lambda a, b, t: function(a, b, t, backend=backend)
    assert torch.equal(run(a, lost, 0.0), a) and torch.equal(run(lost, b, 1.0), b)
    on = randn((2, 9), 3)
    on[0, 0] = math.inf
    weights = torch.tensor([0.0, 1.0])
    nothing = torch.zeros(9)
    _, on_a, on_b, on_t = with_gradients(run, a, b, weights, on)
    assert torch.equal(on_a, torch.stack((on[0], nothing))) and torch.equal(on_b, torch.stack((nothing, on[1])))
    assert torch.equal(on_t, torch.zeros(2))


@pytest.mark.parametrize("backend", BACKENDS)
def test_lerp_is_the_line(backend):
    a, b = pair((4, 7))
    torch.testing.assert_close(onepass.lerp(a, b, 0.3, backend=backend), 0.7 * a + 0.3 * b)
    weights = torch.tensor([-0.5, 0.2, 0.7, 1.5])
    path = onepass.lerp(a, b, weights, backend=backend)
    torch.testing.assert_close(path, torch.lerp(a, b, weights[:, None]))
    assert torch.equal(onepass.lerp(a, a, weights, backend=backend), a)
    torch.testing.assert_close(onepass.lerp(a[0], b[0], torch.linspace(0, 1, 7), backend=backend),
                               torch.lerp(a[0], b[0], torch.linspace(0, 1, 7)))
    assert onepass.lerp(a[0, 0], b[0, 0], 0.5, backend=backend).shape == ()


@pytest.mark.parametrize("backend", BACKENDS)
def test_slerp_turns_evenly(backend):
    u, v = (torch.nn.functional.normalize(x, dim=1) for x in pair((6, 50)))
    for t in (-0.3, 0.1, 0.5, 0.8, 2.5):
        path = onepass.slerp(u, v, t, backend=backend)
        torch.testing.assert_close(path.norm(dim=1), torch.ones(6))
        if 0 <= t <= 1:
            torch.testing.assert_close(angle(u, path), t * angle(u, v), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_slerp_takes_the_dims_of_its_vectors(backend):
    run = lambda *args, **options: onepass.slerp(*args, **options, backend=backend)
    a, b = pair((3, 4, 5))
    whole = run(a, b, 0.3, dim=-1)
    assert torch.equal(whole[:, 1], run(a[:, 1], b[:, 1], 0.3))
    assert torch.equal(run(a, b, 0.3, dim=(1, 2)), run(a, b, 0.3))
    assert torch.equal(run(a, b, 0.3, dim=0), run(a.movedim(0, -1), b.movedim(0, -1), 0.3, dim=-1).movedim(-1, 0))
    weights = torch.tensor([0.1, 0.6, 0.9])
    assert torch.equal(run(a, b, weights, dim=-1)[1], run(a[1], b[1], 0.6, dim=-1))
    _, on_a, _, on_t = with_gradients(lambda *x: run(*x, dim=1), a, b, weights, a)
    moved = with_gradients(lambda *x: run(*x, dim=-1), a.movedim(1, 2), b.movedim(1, 2), weights, a.movedim(1, 2))
    assert torch.equal(on_a, moved[1].movedim(2, 1)) and torch.equal(on_t, moved[3])
    out = torch.full((3, 4, 10), math.nan)[..., ::2]
    assert run(a, b, weights, out=out).data_ptr() == out.data_ptr() and torch.equal(out, run(a, b, weights))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("t", [0.0, 0.2, 0.5, 1.0])
def test_vectors_without_an_angle(t, backend):
    slerp = lambda *args: onepass.slerp(*args, backend=backend)
    a = randn((3, 8))
    zero = torch.zeros_like(a)
    torch.testing.assert_close(slerp(a, zero, t), (1 - t) * a)
    torch.testing.assert_close(slerp(zero, a, t), t * a)
    assert torch.equal(slerp(zero, zero, t), zero) and torch.equal(slerp(a, a, t), a)
    torch.testing.assert_close(slerp(a, 3 * a, t), (1 + 2 * t) * a)
    path = slerp(a, -a, t)                              # half a turn, at an even pace and a constant length
    torch.testing.assert_close(path.norm(dim=1), a.norm(dim=1))
    torch.testing.assert_close(angle(a, path), torch.full((3,), t * math.pi, dtype=torch.float64), rtol=1e-3, atol=1e-3)
    one = torch.eye(3)[:1]
    torch.testing.assert_close(slerp(one, -2 * one, t), (1 + t) * torch.tensor(
        [[math.cos(math.pi * t), math.sin(math.pi * t), 0.0]]))        # of equals the first axis
    single = torch.ones(1, 1)
    torch.testing.assert_close(slerp(single, -single, t), math.cos(math.pi * t) * single)


REGIMES = ("some", "parallel", "opposite", "zero start", "zero end", "both zero", "nearly parallel", "nearly opposite")


def in_regime(name, n, dtype=torch.float32):
    """Two vectors [1, n] at that angle; those with nearly none have it twice beyond the threshold."""
    a, b = pair((1, n), dtype)
    small = 2e-4 * b * a.norm() / b.norm()
    return {
        "some": (a, b), "parallel": (a, 2 * a), "opposite": (a, -2 * a), "zero start": (0 * a, b),
        "zero end": (a, 0 * b), "both zero": (0 * a, 0 * b), "nearly parallel": (a, 2 * a + small),
        "nearly opposite": (a, small - 2 * a),
    }[name]


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("n", [1, 2, 40, 600, 9001])
def test_every_regime_is_the_references(n, regime, backend):
    if n == 1 and regime.startswith("nearly"):
        pytest.skip("numbers are parallel or opposite, with no angle in between")
    a, b = in_regime(regime, n)
    on, t = randn((1, n), 2), torch.tensor([0.3])
    got = with_gradients(onepass.slerp, a, b, t, on, backend=backend)
    truth = with_gradients(onepass.slerp, *(x.double() for x in (a, b, t)), on, backend="reference")
    # Near half a turn the coefficients are in the thousands and cancel, near a line those of the gradients.
    room = {"nearly opposite": 1e-3, "nearly parallel": 1e-5}.get(regime, 1e-6)
    for name, x, y in zip(("path", "start's", "end's", "weight's"), got, truth, strict=True):
        error, largest = (x.double() - y).abs().max(), y.abs().max()
        assert error <= room * largest + 1e-6, f"{name}: {error} of {largest}"


@pytest.mark.parametrize("backend", KERNELS)
def test_bad_and_extreme_vectors_go_where_the_reference_sends_them(backend):
    inf, nan = math.inf, math.nan
    a, b = pair((9, 6))
    a[0, 2], b[1, 0], a[2, 1], b[2, 1], a[3, 5] = inf, -inf, inf, inf, nan
    a[4:6] *= 1e38 / a[4:6].abs().amax(1, keepdim=True)     # squares that overflow in float32
    b[4], b[6:] = b[4] * 1e-30, b[6:] * 1e-38               # and vanish
    a[7] *= 1e-40                                           # denormal
    weights = torch.tensor([0.2, 0.7, 0.4, 0.5, 0.3, 0.6, 0.8, 0.1, nan])
    run = lambda backend, t: onepass.slerp(a, b, t, backend=backend)
    for t in (weights, -weights):
        torch.testing.assert_close(run(backend, t), run("reference", t), rtol=1e-5, atol=0, equal_nan=True)
    half = [x.clamp(-6e4, 6e4).half() for x in (a, b)]
    torch.testing.assert_close(onepass.slerp(*half, weights, backend=backend),
                               onepass.slerp(*half, weights, backend="reference"), equal_nan=True)


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("t", [-0.4, 0.0, 0.3, 0.5, 1.0, 1.7])
def test_the_references_gradient_is_its_formulas(regime, t):
    """Against torch's own derivative of the forward pass, which looks at no regime's formula."""
    a, b = in_regime(regime, 5, torch.float64)
    t = torch.tensor([t], dtype=torch.float64)
    on = randn((1, 5), 2, torch.float64)
    leaves = [x.detach().clone().requires_grad_() for x in (a, b, t)]
    run = reference.interpolate(leaves[0][:, None], leaves[1][:, None], 0.0, leaves[2], True)
    truth = torch.autograd.grad(run, leaves, on[:, None], allow_unused=True, materialize_grads=True)
    got = reference.interpolate_backward(on[:, None], a[:, None], b[:, None], 0.0, t, True, True)
    for x, y in zip(got, truth, strict=True):
        torch.testing.assert_close(x.reshape(y.shape), y, rtol=1e-6, atol=1e-6)


def test_small_angles_keep_their_digits():
    a = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    for size in (1e-6, 1e-3, math.pi - 1e-3):
        b = torch.tensor([[math.cos(size), math.sin(size)]], dtype=torch.float64)
        path = onepass.slerp(a, b, 0.25, backend="reference")
        expected = torch.tensor([[math.cos(size / 4), math.sin(size / 4)]], dtype=torch.float64)
        torch.testing.assert_close(path, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("backend", KERNELS)
def test_the_thresholds_are_the_references(backend):
    """On either side of 1e-4 rad from a line; the sides differ by the plane of the turn near pi."""
    a = torch.tensor([[3.0, 0.0, 4.0]])
    across = torch.tensor([[-0.8, 0.0, 0.6]])
    for size in (0.9e-4, 1.1e-4, math.pi - 1.1e-4, math.pi - 0.9e-4):
        b = (math.cos(size) * a + math.sin(size) * 5 * across).float()
        got, truth = (onepass.slerp(a, b, 0.5, backend=x) for x in (backend, "reference"))
        torch.testing.assert_close(got, truth, rtol=1e-3, atol=1e-3)


def test_gradients():
    a, b = (x.double().requires_grad_() for x in pair((3, 5)))
    t = torch.tensor([0.2, 0.5, 0.7], dtype=torch.float64, requires_grad=True)
    one = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    for function in FUNCTIONS:
        run = lambda *x, f=function: f(*x, backend="reference")
        assert torch.autograd.gradcheck(run, (a, b, t)) and torch.autograd.gradcheck(run, (a, b, one))
    assert torch.autograd.gradcheck(lambda a, b: onepass.slerp(a, -a, 0.3, backend="reference"), (a, b))


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_weight_of_all_rows_has_the_sum_of_theirs(function, backend):
    a, b, on = *pair((7, 3, 40)), randn((7, 3, 40), 2)
    run = lambda *x: function(*x, backend=backend)
    whole = with_gradients(run, a, b, torch.tensor(0.3), on)
    rows = with_gradients(run, a, b, torch.full((7,), 0.3), on)
    torch.testing.assert_close(whole[3], rows[3].sum())
    assert all(map(torch.equal, whole[:3], rows[:3]))
    leaf = torch.tensor(0.3, dtype=torch.bfloat16, requires_grad=True)
    assert torch.autograd.grad(run(a, b, leaf).sum(), leaf)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("shape", [(4, 33), (3, 700), (3, 9001)])
def test_a_row_does_not_depend_on_the_batch(shape, backend):
    a, b, on = *pair(shape), randn(shape, 2)
    t = torch.linspace(0.2, 0.9, shape[0])
    a[-1] = -b[-1]
    for function in FUNCTIONS:
        run = lambda *x, f=function: f(*x, backend=backend)
        whole = with_gradients(run, a, b, t, on)
        assert all(map(torch.equal, whole, with_gradients(run, a, b, t, on)))
        for i in range(shape[0]):
            alone = with_gradients(run, a[i : i + 1], b[i : i + 1], t[i : i + 1], on[i : i + 1])
            assert all(torch.equal(x[0], y[i]) for x, y in zip(alone, whole, strict=True))


@pytest.mark.parametrize("backend", [TRITON])
@pytest.mark.parametrize("n", [260, 129])
def test_vectors_of_several_parts_give_what_one_gives(n, backend, monkeypatch):
    from onepass.kernels import interpolate as kernels

    a, b, on = *pair((5, n)), randn((5, n), 2)
    b[1], b[2, :128] = -2 * a[1], 0
    a[1, [70, 90, 200 % n]] = 0                                 # of equals the first, in another tile or part
    b[1], a[3] = -2 * a[1], math.nan
    for function in FUNCTIONS:
        run = lambda t, f=function: with_gradients(f, a, b, t, on, backend=backend)
        weights = (torch.linspace(0.2, 0.9, 5), torch.tensor(0.4))
        whole = [x for t in weights for x in run(t)]
        with monkeypatch.context() as small:
            small.setattr(kernels, "_WHOLE", 16)
            for most in (256, 3):                               # parts of one tile, and of several
                small.setattr(kernels, "_PARTS", most)
                cut = [x for t in weights for x in run(t)]
                torch.testing.assert_close(cut, whole, equal_nan=True)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", cases.FLOATS)
def test_views_are_read_where_they_lie(dtype, backend):
    base = randn((3, 8, 45), 0, dtype)
    a, b = base[:, :4], base[:, 4:]
    t = torch.tensor([0.1, 0.2, 0.3])
    for function in FUNCTIONS:
        got = function(a, b, t, backend=backend)
        assert torch.equal(got, function(a.contiguous(), b.contiguous(), t, backend=backend))
        shifted = function(base[:, 1:5, 3:], base[:, 2:6, :-3], t.expand(2, 3)[1], backend=backend)
        assert torch.equal(shifted, function(base[:, 1:5, 3:].clone(), base[:, 2:6, :-3].clone(), t, backend=backend))


@settings(deadline=None, max_examples=30)
@given(shape=st.lists(st.integers(1, 12), min_size=1, max_size=2), threads=st.sampled_from([2, 3]),
       long=st.sampled_from([1, 40, 700, 30000]))
def test_threads_and_shapes(shape, threads, long):
    """Whoever sums a tile, the bits are one thread's."""
    a, b, on = (randn((*shape, long), seed) for seed in range(3))
    weight = torch.tensor(0.3)
    before = torch.get_num_threads()
    try:
        results = []
        for count in (threads, 1):
            torch.set_num_threads(count)
            results.append([x for f in FUNCTIONS for x in with_gradients(f, a, b, weight, on)])
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, *results))
    torch.testing.assert_close(results[0][4], onepass.slerp(a, b, 0.3, backend="reference"), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not ISAS, reason="no native extension")
def test_threads_that_share_a_vector_add_its_tiles_in_the_order_of_one():
    """Six vectors are whole tasks of one thread and shared by three; near half a turn a sum's last digit shows."""
    a = randn((6, 30001))
    b = 1.5e-4 * randn((6, 30001), 1) - a
    before = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(with_gradients(onepass.slerp, a, b, torch.linspace(0.1, 0.9, 6), a))
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, results[0], results[1])) and all(map(torch.equal, results[0], results[2]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("run", [onepass.lerp, onepass.slerp])
@pytest.mark.parametrize("weights", [torch.linspace(0, 1, 6)[::2], torch.tensor([0.3]).expand(3)])
def test_weights_may_be_a_view(run, backend, weights):
    a, b = pair((3, 8))
    assert torch.equal(run(a, b, weights, backend=backend), run(a, b, weights.clone(), backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_library_op(backend):
    torch._dynamo.reset()
    a, b = (x[:, None].requires_grad_() for x in pair((3, 8)))
    t = torch.tensor([0.1, 0.5, 0.9], requires_grad=True)
    for args in ((a, b, 0.3, None, True), (a, b, 0.0, t, False), (a, b, 0.0, t, True)):
        torch.library.opcheck(torch.ops.onepass.interpolate.default, args, {"backend": backend})
    a, b = pair((3, 8))
    f = lambda a, b, t: onepass.slerp(a, b, t) + onepass.lerp(a, b, 0.2)
    assert torch.equal(torch.compile(f, fullgraph=True, backend="aot_eager")(a, b, t), f(a, b, t))
    wide = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64, requires_grad=True)       # of the op itself, any dtype
    for arc in (True, False):
        got, same = (torch.ops.onepass.interpolate(a[:, None], b[:, None], 0.0, x, arc, backend=backend)
                     for x in (wide, t))
        assert torch.equal(got, same)
        on_wide, on_t = (torch.autograd.grad(out.sum(), x)[0] for out, x in ((got, wide), (same, t)))
        assert on_wide.dtype == torch.float64 and torch.allclose(on_wide.float(), on_t, rtol=1e-5)
    mapped = torch.vmap(lambda a, b: onepass.slerp(a, b, 0.3, backend=backend))(a[:, None], b[:, None])
    assert torch.equal(mapped[:, 0], onepass.slerp(a, b, 0.3, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_of_nothing(function, backend):
    for shape in ((0, 3), (3, 0)):
        x = torch.zeros(shape, requires_grad=True)
        result = function(x, x, 0.5, backend=backend)
        assert result.shape == shape and torch.autograd.grad(result.sum(), x)[0].shape == shape


ISA_CODE = """
import torch, onepass
from onepass import _native
assert _native._C.isa == {isa!r}
g = torch.Generator().manual_seed(0)
for shape in ((5, 77), (3, 9001)):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        a, b = (torch.randn(shape, generator=g).to(dtype).requires_grad_() for _ in range(2))
        t = torch.linspace(0.1, 0.8, shape[0], requires_grad=True)
        both = [f(a, b, t, backend=x) for f in (onepass.lerp, onepass.slerp) for x in ("cpu", "reference")]
        for own, reference in (both[:2], both[2:]):
            torch.testing.assert_close(own, reference)
            for x, y in zip(*(torch.autograd.grad(z.sin().sum(), (a, b, t)) for z in (own, reference))):
                torch.testing.assert_close(x, y, rtol=1e-2, atol=1e-2)
print("ok")
"""


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa):
    assert run_python(ISA_CODE.format(isa=isa), ONEPASS_CPU_ISA=isa).strip() == "ok"


@pytest.mark.parametrize(("change", "error", "text"), [
    ({"start": 3}, TypeError, "start is int, expected a tensor"),
    ({"end": torch.zeros(3)}, ValueError, r"end has shape \(3,\), expected that of start, \(2, 3\)"),
    ({"weight": "half"}, TypeError, "weight is str, expected a number or a float tensor"),
    ({"weight": torch.zeros(3)}, ValueError, r"weight has shape \(3,\), expected \(\) or \(2,\)"),
    ({"weight": torch.zeros(2, dtype=torch.int64)}, TypeError, "weight has dtype torch.int64"),
    ({"dim": 2}, ValueError, "dim=2: expected dims of start, which has 2"),
    ({"dim": 0, "weight": torch.zeros(2)}, ValueError, "dim=0 with a weight for each row"),
    ({"out": torch.zeros(3)}, ValueError, r"out has shape \(3,\), expected \(2, 3\)"),
    ({"backend": "cuda"}, ValueError, "a tensor is on cpu, the kernel reads device memory"),
])
def test_bad_input(change, error, text):
    with pytest.raises(error, match=text):
        onepass.slerp(**{"start": torch.zeros(2, 3), "end": torch.zeros(2, 3), "weight": 0.5, **change})
