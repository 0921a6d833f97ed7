"""lerp and slerp: exact ends, angles that grow evenly, and vectors that have no angle."""
import math

import pytest
import torch

import onepass

import cases


def pair(shape, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=g).to(dtype) for _ in range(2)]


def angle(a, b):
    cosine = torch.nn.functional.cosine_similarity(a.double().flatten(1), b.double().flatten(1))
    return torch.acos(cosine.clamp(-1, 1))


@pytest.mark.parametrize("function", [onepass.lerp, onepass.slerp])
@pytest.mark.parametrize("dtype", [*cases.FLOATS, torch.float64])
def test_ends_are_exact_and_rows_have_weights_of_their_own(function, dtype):
    a, b = pair((5, 3, 4), dtype)
    assert torch.equal(function(a, b, 0.0), a) and torch.equal(function(a, b, 1), b)
    weights = torch.tensor([0.0, 1.0, 0.25, 0.5, 0.9])
    path = function(a, b, weights)
    assert path.dtype == dtype and torch.equal(path[0], a[0]) and torch.equal(path[1], b[1])
    for i in range(5):
        alone = function(a[i : i + 1], b[i : i + 1], weights[i].item())
        torch.testing.assert_close(alone[0], path[i])
        assert torch.equal(function(a[i : i + 1], b[i : i + 1], weights[i : i + 1])[0], path[i])
    assert torch.equal(function(a[0], b[0], 0.3), function(a[0], b[0], torch.tensor(0.3, dtype=torch.float64)))


def test_lerp_is_the_line():
    a, b = pair((4, 7))
    torch.testing.assert_close(onepass.lerp(a, b, 0.3), 0.7 * a + 0.3 * b)


def test_slerp_follows_its_formula_and_turns_evenly():
    a, b = pair((6, 50))
    w = angle(a, b)
    for t in (0.1, 0.5, 0.8):
        path = onepass.slerp(a, b, t)
        weights = (torch.sin((1 - t) * w) / torch.sin(w), torch.sin(t * w) / torch.sin(w))
        formula = weights[0][:, None] * a.double() + weights[1][:, None] * b.double()
        torch.testing.assert_close(path.double(), formula, rtol=1e-5, atol=1e-5)
    u, v = (torch.nn.functional.normalize(x, dim=1) for x in (a, b))
    for t in (0.1, 0.5, 0.8):
        path = onepass.slerp(u, v, t)
        torch.testing.assert_close(path.norm(dim=1), torch.ones(6))
        torch.testing.assert_close(angle(u, path), t * angle(u, v), rtol=1e-4, atol=1e-5)


def test_slerp_takes_the_dims_of_its_vectors():
    a, b = pair((3, 4, 5))
    whole = onepass.slerp(a, b, 0.3, dim=-1)
    torch.testing.assert_close(whole[:, 1], onepass.slerp(a[:, 1], b[:, 1], 0.3))
    torch.testing.assert_close(onepass.slerp(a, b, 0.3, dim=(1, 2)), onepass.slerp(a, b, 0.3))
    torch.testing.assert_close(onepass.slerp(a, b, 0.3, dim=0), onepass.slerp(a.movedim(0, -1), b.movedim(0, -1), 0.3,
                                                                             dim=-1).movedim(-1, 0))


@pytest.mark.parametrize("t", [0.0, 0.2, 0.5, 1.0])
def test_vectors_without_an_angle(t):
    a, _ = pair((3, 8))
    zero = torch.zeros_like(a)
    torch.testing.assert_close(onepass.slerp(a, zero, t), (1 - t) * a)
    torch.testing.assert_close(onepass.slerp(zero, a, t), t * a)
    assert torch.equal(onepass.slerp(zero, zero, t), zero)
    torch.testing.assert_close(onepass.slerp(a, a, t), a)
    torch.testing.assert_close(onepass.slerp(a, 3 * a, t), (1 + 2 * t) * a)
    path = onepass.slerp(a, -a, t)                              # half a turn, at an even pace and a constant length
    torch.testing.assert_close(path.norm(dim=1), a.norm(dim=1))
    torch.testing.assert_close(angle(a, path), torch.full((3,), t * math.pi, dtype=torch.float64), rtol=1e-3, atol=1e-3)
    one = torch.eye(3)[:1]
    assert onepass.slerp(one, -one, t).isfinite().all()


def test_small_angles_keep_their_digits():
    a = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    for size in (1e-6, 1e-3, math.pi - 1e-3):
        b = torch.tensor([[math.cos(size), math.sin(size)]], dtype=torch.float64)
        path = onepass.slerp(a, b, 0.25)
        expected = torch.tensor([[math.cos(size / 4), math.sin(size / 4)]], dtype=torch.float64)
        torch.testing.assert_close(path, expected, rtol=1e-9, atol=1e-12)


def test_gradients():
    a, b = (x.double().requires_grad_() for x in pair((3, 5)))
    t = torch.tensor([0.2, 0.5, 0.7], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(onepass.lerp, (a, b, t)) and torch.autograd.gradcheck(onepass.slerp, (a, b, t))
    zero = torch.zeros(2, 4, requires_grad=True)
    onepass.slerp(zero, zero, 0.5).sum().backward()
    assert zero.grad.isfinite().all()


def test_compiles():
    torch._dynamo.reset()
    a, b = pair((3, 8))
    f = lambda a, b: onepass.slerp(a, b, 0.3) + onepass.lerp(a, b, 0.2)
    torch.testing.assert_close(torch.compile(f, fullgraph=True, backend="aot_eager")(a, b), f(a, b))
    assert onepass.slerp(torch.zeros(0, 3), torch.zeros(0, 3), 0.5).shape == (0, 3)


@pytest.mark.parametrize(("change", "error", "text"), [
    ({"start": 3}, TypeError, "start is int, expected a tensor"),
    ({"end": torch.zeros(3)}, ValueError, r"end has shape \(3,\), expected that of start, \(2, 3\)"),
    ({"weight": "half"}, TypeError, "weight is str, expected a number or a float tensor"),
    ({"weight": torch.zeros(3)}, ValueError, r"weight has shape \(3,\), expected \(\) or \(2,\)"),
    ({"weight": torch.zeros(2, dtype=torch.int64)}, TypeError, "weight has dtype torch.int64"),
    ({"dim": 2}, ValueError, "dim=2: expected dims of start, which has 2"),
    ({"dim": 0, "weight": torch.zeros(2)}, ValueError, "dim=0 with a weight for each row"),
])
def test_bad_input(change, error, text):
    with pytest.raises(error, match=text):
        onepass.slerp(**{"start": torch.zeros(2, 3), "end": torch.zeros(2, 3), "weight": 0.5, **change})
