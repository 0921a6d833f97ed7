"""The gradient of Triton's attention, dense and ragged: against float64, alone and in a batch, empty, poisoned."""

from __future__ import annotations

import itertools

import pytest
import torch
from test_attention_backward import assert_gradients_as_good_as_torch, gradients, onepass_on
from test_attention_triton import here

import onepass

from cases import FLOATS
from helpers import INTERPRETED, TRITON
from test_attention import OPTIONS, in_float64, inputs, options, randn
from test_attention_varlen import OPTIONS as RAGGED_OPTIONS
from test_attention_varlen import Ragged

pytestmark = [pytest.mark.parametrize("backend", [TRITON]), pytest.mark.usefixtures("on_its_device")]

# Tiles cut off on both sides, groups, value dims unlike head dims; one of a single query.
CASES = ((2, 5, 37, 4, 2, 16, 16), (1, 40, 70, 2, 1, 24, 20), (1, 1, 33, 4, 1, 72, 40))
# Of the largest element. The rule below takes a case too large for the interpreter, or many draws.
TOLERANCES = {torch.float32: 4e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def assert_close(got, truth, dtype, names=("dq", "dk", "dv", "dsinks")):
    for name, a, b in zip(names, got, truth, strict=False):
        assert a.dtype == dtype
        scale = float(b.abs().max()) if b.numel() else 0.0
        torch.testing.assert_close(a.double(), b, rtol=0, atol=TOLERANCES[dtype] * scale, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("case", "option"), list(itertools.product(CASES, OPTIONS)))
def test_every_option_against_float64(case, option, dtype, backend):
    if INTERPRETED and (dtype == torch.float16 or (dtype == torch.bfloat16) != (OPTIONS.index(option) % 2 == 1)):
        pytest.skip("interpreted, a program takes a millisecond: this combination runs on a GPU only")
    leaves, chosen = inputs(case, dtype), here(options(option, case))
    if "sinks" in chosen:
        chosen["sinks"] = chosen["sinks"].to(dtype)
    of_out = randn(*case[:2], case[3], case[6], seed=8, dtype=dtype)
    got = gradients(onepass_on(backend), leaves, chosen, of_out)
    truth = gradients(onepass_on("reference"), [x.double() for x in leaves], in_float64(chosen), of_out.double())
    assert_close(got, truth, dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("option", ["none", "causal", "window"])
def test_as_good_as_torch(option, dtype, backend):
    if INTERPRETED and (dtype == torch.float16 or option != "causal"):
        pytest.skip("interpreted, a program takes a millisecond: this combination runs on a GPU only")
    assert_gradients_as_good_as_torch((1, 40, 70, 4, 2, 24, 20), option, dtype, backend)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("option", RAGGED_OPTIONS)
def test_ragged_rows_against_float64(option, dtype, backend):
    if INTERPRETED and dtype != (torch.bfloat16 if option in ("causal", "many") else torch.float32):
        pytest.skip("interpreted, a program takes a millisecond: this combination runs on a GPU only")
    rows, chosen = Ragged(((5, 37), (0, 9), (3, 0), (19, 19)), dtype=dtype), here(RAGGED_OPTIONS[option])
    if "sinks" in chosen:
        chosen["sinks"] = chosen["sinks"].to(dtype)
    of_out = randn(rows.q.shape[0], 4, 24, seed=8, dtype=dtype)
    of_lse = randn(4, rows.q.shape[0], seed=9)
    of_lse[:, 5:8] = 0                      # of a row without keys: its lse is -inf

    def of(backend, tensors, chosen, grads):
        leaves = [x.detach().requires_grad_() for x in tensors]
        if "sinks" in chosen:
            chosen = chosen | {"sinks": chosen["sinks"].detach().requires_grad_()}
            leaves.append(chosen["sinks"])
        results = onepass.attention_varlen(*leaves[:3], *rows.lengths(), return_lse=True, backend=backend, **chosen)
        return torch.autograd.grad(results, leaves, grads)

    got = of(backend, rows.tensors(), chosen, (of_out, of_lse))
    wide = [x.double() for x in rows.tensors()]
    truth = of("reference", wide, in_float64(chosen), (of_out.double(), of_lse.double()))
    assert_close(got, truth, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_alone_in_a_batch_and_packed(dtype, backend):
    case = (3, 20, 37, 4, 2, 16, 16)
    leaves, of_out = inputs(case, dtype), randn(3, 20, 4, 16, seed=8, dtype=dtype)
    together = gradients(onepass_on(backend), leaves, {"causal": True}, of_out)
    again = gradients(onepass_on(backend), leaves, {"causal": True}, of_out)
    assert all(map(torch.equal, together, again))
    alone = gradients(onepass_on(backend), [x[1:2] for x in leaves], {"causal": True}, of_out[1:2])
    assert all(torch.equal(a[0], whole[1]) for a, whole in zip(alone, together, strict=True))
    packed = lambda q, k, v: onepass.attention_varlen(
        q, k, v, *(torch.arange(4, dtype=torch.int32) * n for n in case[1:3]), *case[1:3], causal=True, backend=backend
    )
    ragged = gradients(packed, [x.flatten(0, 1) for x in leaves], {}, of_out.flatten(0, 1))
    assert all(torch.equal(a, whole.flatten(0, 1)) for a, whole in zip(ragged, together, strict=True))


def test_views_and_a_gradient_that_is_expanded(backend):
    def view(steps, heads, dim, seed):
        return randn(steps + 1, 2, heads + 1, dim + 3, seed=seed).transpose(0, 1)[1:, 1:, 1:, 2:-1]

    leaves = view(9, 4, 8, 1), view(40, 2, 8, 2), view(40, 2, 6, 3)
    of_out = torch.ones(()).expand(1, 9, 4, 6)
    got = gradients(onepass_on(backend), leaves, {"causal": True}, of_out)
    plain = gradients(onepass_on(backend), [x.contiguous() for x in leaves], {"causal": True}, of_out.contiguous())
    assert all(map(torch.equal, got, plain))


@pytest.mark.parametrize("sizes", [(2, 3, 0, 4, 2, 16, 16), (2, 0, 5, 2, 2, 8, 8), (0, 3, 5, 2, 2, 8, 8)])
def test_empty_sizes_give_zeros(sizes, backend):
    leaves = [x.requires_grad_() for x in (*inputs(sizes), randn(sizes[3], seed=5))]
    out, lse = onepass.attention(*leaves[:3], sinks=leaves[3], return_lse=True, backend=backend)
    grads = torch.autograd.grad(out.sum() + lse.sum(), leaves)
    assert all((g == 0).all() for g in grads[:3])
    assert torch.equal(grads[3], torch.full((sizes[3],), float(sizes[0] * sizes[1])) if sizes[2] == 0 else grads[3] * 0)


def test_masked_keys_may_hold_nan(backend):
    leaves, of_out = inputs((1, 20, 70, 2, 1, 16, 16)), randn(1, 20, 2, 16, seed=8)
    seen = torch.ones(1, 1, 20, 70, dtype=torch.bool)
    seen[..., 33] = False
    clean = gradients(onepass_on(backend), leaves, {"mask": seen}, of_out)
    leaves[2][0, 33] = torch.nan
    poisoned = gradients(onepass_on(backend), leaves, {"mask": seen}, of_out)
    for name, a, b in zip(("dk", "dv"), poisoned[1:], clean[1:], strict=True):
        assert torch.equal(a, b), name


def test_tokens_of_no_row_have_no_gradient(backend):
    """On a GPU the ends of rows are not read, so tokens past the last one are the kernel's business."""
    from onepass.kernels.attention_backward import varlen_backward

    q, k = randn(12, 2, 16, seed=1), randn(20, 2, 16, seed=2)
    ends = torch.tensor([0, 4, 9], dtype=torch.int32), torch.tensor([0, 7, 15], dtype=torch.int32)
    lse = torch.zeros(2, 12)
    grads = varlen_backward(q, None, q, k, k, q, lse, *ends, 5, 8, False, -1, -1, 0.0, 0.25)
    for got, last in zip(grads, (9, 15, 15), strict=False):
        assert got[:last].any(1).any(1).all() and not got[last:].any()
