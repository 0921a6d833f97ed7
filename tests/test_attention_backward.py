"""The gradient of attention on the CPU: every option against float64, and what it may not depend on."""

from __future__ import annotations

import itertools

import pytest
import torch

import onepass

from cases import ATTENTION, FLOATS
from helpers import ISAS, assert_as_good_as_torch, run_python
from test_attention import OPTIONS, core, in_float64, inputs, options, randn

pytestmark = pytest.mark.skipif(not ISAS, reason="no native extension")

# several tiles of queries and of keys beside the shared cases, each of them cut off somewhere
CASES = (*(case for case in ATTENTION if max(case[1], case[2]) < 1000), (1, 220, 220, 2, 1, 24, 20))


def sweep():
    for case, option in itertools.product(CASES, OPTIONS):
        b, sq, sk, h, _, d, _ = case
        quick = b * sq * sk * h * d < 1_000_000 or option in ("causal", "many")
        yield pytest.param(case, option, id=f"{case}-{option}", marks=() if quick else pytest.mark.slow)


def gradients(call, leaves, chosen, of_out):
    leaves = [x.detach().requires_grad_() for x in leaves]
    if "sinks" in chosen:
        chosen = chosen | {"sinks": chosen["sinks"].detach().requires_grad_()}
        leaves.append(chosen["sinks"])
    return torch.autograd.grad(call(*leaves[:3], **chosen), leaves, of_out)


def onepass_on(backend):
    return lambda q, k, v, **chosen: onepass.attention(q, k, v, backend=backend, **chosen)


def assert_gradients_as_good_as_torch(case, option, dtype, backend="cpu"):
    """The rule compares the largest errors; of few numbers these are luck, so a small case is drawn many times."""
    draws = []
    fewest = case[3] if option in ("sinks", "many") else case[0] * case[1] * case[3] * case[5]
    for draw in range(24 if fewest < 1000 and case[0] * case[1] * case[2] * case[3] < 20_000 else 1):
        again = [randn(*x.shape, seed=100 * draw + i, dtype=dtype) for i, x in enumerate(inputs(case))]
        leaves, chosen = again if draw else list(inputs(case, dtype)), options(option, case)
        if "sinks" in chosen:
            chosen["sinks"] = (chosen["sinks"] + 0.1 * draw).to(dtype)
        of_out = randn(*leaves[0].shape[:3], case[6], seed=100 * draw + 8, dtype=dtype)
        wide = [x.double() for x in leaves], in_float64(chosen), of_out.double()
        draws.append((
            gradients(onepass_on(backend), leaves, chosen, of_out),
            gradients(lambda q, k, v, **o: core(q, k, v, **o)[0], leaves, chosen, of_out),
            gradients(onepass_on("reference"), *wide),
        ))  # fmt: skip
    for i, name in enumerate(("dq", "dk", "dv", "dsinks")[: len(draws[0][0])]):
        got, same, truth = (torch.stack([draw[which][i] for draw in draws]) for which in range(3))
        assert got.dtype == dtype
        assert_as_good_as_torch(got, same, truth, f"{name} of {case}, {option}")


@pytest.mark.parametrize(("case", "option"), list(sweep()))
def test_as_good_as_torch(case, option):
    if not (case[0] and case[1] and case[2]):
        pytest.skip("PyTorch's own steps do not take empty sizes")
    for dtype in FLOATS:
        assert_gradients_as_good_as_torch(case, option, dtype)


def test_keys_that_many_queries_see_sum_as_exactly_as_torch():
    """The first keys of a causal row add up every query: here 4096, the largest first."""
    case = (1, 1024, 1024, 8, 2, 64, 64)
    leaves, of_out = inputs(case), randn(1, 1024, 8, 64, seed=8)
    got = gradients(onepass_on("cpu"), leaves, {"causal": True}, of_out)
    same = gradients(lambda q, k, v, **o: core(q, k, v, **o)[0], leaves, {"causal": True}, of_out)
    truth = gradients(onepass_on("reference"), [x.double() for x in leaves], {"causal": True}, of_out.double())
    for name, ours, torchs, exact in zip(("dq", "dk", "dv"), got, same, truth, strict=True):
        assert (ours - exact).abs().max() <= (torchs - exact).abs().max(), name


@pytest.mark.parametrize("sizes", [(2, 3, 0, 4, 2, 16, 16), (2, 0, 5, 2, 2, 8, 8), (0, 3, 5, 2, 2, 8, 8)])
def test_empty_sizes_give_zeros(sizes):
    leaves = [x.requires_grad_() for x in (*inputs(sizes), randn(sizes[3], seed=5))]
    out, lse = onepass.attention(*leaves[:3], sinks=leaves[3], return_lse=True, backend="cpu")
    grads = torch.autograd.grad(out.sum() + lse.sum(), leaves)
    assert all((g == 0).all() for g in grads[:3])
    assert torch.equal(grads[3], torch.full((sizes[3],), float(sizes[0] * sizes[1])) if sizes[2] == 0 else grads[3] * 0)


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa):
    code = """
import torch, onepass
from test_attention_backward import FLOATS, OPTIONS, assert_gradients_as_good_as_torch
assert onepass._native._C.isa == {isa!r}
torch.set_num_threads(1)
for case in ((3, 7, 129, 6, 2, 40, 72), (1, 110, 70, 2, 1, 17, 33)):
    for option in OPTIONS:
        for dtype in FLOATS:
            assert_gradients_as_good_as_torch(case, option, dtype)
"""
    run_python(
        f"import sys; sys.path.insert(0, {__file__.rsplit('/', 1)[0]!r})\n" + code.format(isa=isa), ONEPASS_CPU_ISA=isa
    )


def test_views_with_strides_and_offsets():
    def view(steps, heads, dim, seed):
        return randn(steps + 1, 4, heads + 1, dim + 3, seed=seed).transpose(0, 1)[1:, 1:, 1:, 2:-1]

    q, k, v = view(9, 4, 8, 1), view(40, 2, 8, 2), view(40, 2, 6, 3)
    of_out = randn(6, 4, 3, 9, seed=8).permute(2, 3, 1, 0)
    got = gradients(onepass_on("cpu"), (q, k, v), {"causal": True}, of_out)
    plain = gradients(onepass_on("cpu"), [x.contiguous() for x in (q, k, v)], {"causal": True}, of_out.contiguous())
    assert all(map(torch.equal, got, plain))


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_row_alone_has_the_same_bits(dtype):
    leaves, of_out = inputs((3, 130, 150, 4, 2, 32, 32), dtype), randn(3, 130, 4, 32, seed=8, dtype=dtype)
    together = gradients(onepass_on("cpu"), leaves, {"causal": True}, of_out)
    threads = torch.get_num_threads()
    try:
        for n in (1, 3, 8):
            torch.set_num_threads(n)
            again = gradients(onepass_on("cpu"), leaves, {"causal": True}, of_out)
            assert all(map(torch.equal, together, again))
    finally:
        torch.set_num_threads(threads)
    for b in range(3):
        alone = gradients(onepass_on("cpu"), [x[b : b + 1] for x in leaves], {"causal": True}, of_out[b : b + 1])
        assert all(torch.equal(a[0], whole[b]) for a, whole in zip(alone, together, strict=True))


def test_masked_keys_may_hold_nan():
    leaves, of_out = inputs((1, 20, 70, 2, 1, 16, 16)), randn(1, 20, 2, 16, seed=8)
    seen = torch.ones(1, 1, 20, 70, dtype=torch.bool)
    seen[..., 33] = False
    clean = gradients(onepass_on("cpu"), leaves, {"mask": seen}, of_out)
    leaves[1][0, 33] = torch.nan
    poisoned = gradients(onepass_on("cpu"), leaves, {"mask": seen}, of_out)
    for name, a, b in zip(("dk", "dv"), poisoned[1:], clean[1:], strict=True):
        assert torch.equal(a, b), name


def test_no_score_matrix_is_stored():
    code = """
import resource, torch, onepass
q, k, v = (torch.randn(1, 12000, 1, 8, requires_grad=True) for _ in range(3))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
onepass.attention(q[:, :99], k, v, backend="cpu").sum().backward()
before = peak()
onepass.attention(q, k, v, causal=True, backend="cpu").sum().backward()
print(peak() - before)
"""
    kilobytes = int(run_python(code))
    assert kilobytes < 12000 * 12000 * 4 / 1024 / 10
