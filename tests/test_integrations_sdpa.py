"""scaled_dot_product_attention of onepass against PyTorch's: signature, values and gradients."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F

from onepass.integrations.sdpa import scaled_dot_product_attention

from cases import FLOATS
from helpers import assert_as_good_as_torch
from test_attention import randn

SHAPES = [  # query [..., H, L, E], key [..., Hkv, S, E], value's width
    ((2, 4, 9, 16), (2, 4, 9, 16), 16),
    ((2, 4, 5, 16), (2, 2, 33, 16), 24),
    ((1, 6, 40, 32), (1, 2, 7, 32), 8),
    ((4, 9, 16), (4, 11, 16), 16),
    ((9, 16), (11, 16), 5),
    ((2, 3, 4, 5, 8), (2, 3, 2, 6, 8), 8),
    ((2, 3, 4, 5, 8), (1, 3, 4, 6, 8), 8),
    ((2, 4, 5, 8), (2, 1, 6, 8), 8),
]
OPTIONS = ("none", "causal", "bool", "additive", "rows", "scale")


def call(shape, other, width, option):
    q, k, v = randn(*shape, seed=1), randn(*other, seed=2), randn(*other[:-1], width, seed=3)
    full = (*torch.broadcast_shapes(shape[:-3], other[:-3]), *shape[-3:-1], other[-2])
    kwargs = {
        "none": {},
        "causal": {"is_causal": True},
        "bool": {"attn_mask": randn(*full, seed=4) > -0.5},
        "additive": {"attn_mask": randn(*full[-2:], seed=5)},
        "rows": {"attn_mask": randn(*full[:-2], 1, full[-1], seed=6) > -0.5},
        "scale": {"scale": 0.3},
    }[option]
    heads = (q.dim() > 2 and q.shape[-3]) != (k.dim() > 2 and k.shape[-3])
    return (q, k, v), kwargs | ({"enable_gqa": True} if heads else {})


def cast(kwargs, dtype):
    mask = kwargs.get("attn_mask")
    return kwargs if mask is None or mask.dtype == torch.bool else kwargs | {"attn_mask": mask.to(dtype)}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_values_are_those_of_torch(case, option):
    tensors, kwargs = call(*case, option)
    for dtype in FLOATS:
        narrow = [x.to(dtype) for x in tensors]
        out = scaled_dot_product_attention(*narrow, **cast(kwargs, dtype))
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            same = F.scaled_dot_product_attention(*narrow, **cast(kwargs, dtype))
            truth = F.scaled_dot_product_attention(*(x.double() for x in narrow), **cast(kwargs, torch.float64))
        assert out.dtype == dtype
        if kwargs.get("is_causal"):
            assert truth.isfinite().all()
        assert_as_good_as_torch(out, same, truth)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_gradients_are_those_of_torch(case, option):
    tensors, kwargs = call(*case, option)
    leaves, wide = ([x.to(t).requires_grad_() for x in tensors] for t in (torch.float32, torch.float64))
    got = torch.autograd.grad(scaled_dot_product_attention(*leaves, **kwargs).square().sum(), leaves)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        theirs = F.scaled_dot_product_attention(*wide, **cast(kwargs, torch.float64))
    truth = torch.autograd.grad(theirs.square().sum(), wide)
    for a, b in zip(got, truth, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


def test_causal_is_aligned_at_the_top_left():
    q, k, v = torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 5, 2), torch.arange(5.0).reshape(1, 1, 5, 1)
    assert scaled_dot_product_attention(q, k, v, is_causal=True).flatten().tolist() == [0, 0.5, 1]
    long = torch.zeros(1, 1, 7, 2)
    expected = torch.tensor([0, 0.5, 1, 1.5, 2, 2, 2])
    torch.testing.assert_close(scaled_dot_product_attention(long, k, v, is_causal=True).flatten(), expected)


def test_the_call_is_that_of_torch():
    ours = inspect.signature(scaled_dot_product_attention).parameters
    theirs = torch.ops.aten.scaled_dot_product_attention.default._schema.arguments
    assert [a.name for a in theirs] == list(ours)
    for argument in theirs:
        mine = ours[argument.name]
        assert (mine.kind is mine.KEYWORD_ONLY) == argument.kwarg_only
        assert (None if mine.default is mine.empty else mine.default) == argument.default_value


def test_bad_input_says_what_and_why():
    q, k = torch.zeros(2, 4, 3, 8), torch.zeros(2, 2, 3, 8)
    for message, error, arguments, kwargs in [
        ("dropout_p=0.1: onepass has no attention dropout", ValueError, (q, q, q), {"dropout_p": 0.1}),
        ("attn_mask and is_causal are both given", ValueError, (q, q, q),
         {"attn_mask": torch.ones(3, 3).bool(), "is_causal": True}),
        ("key has 2 heads and query 4: expected the same, or enable_gqa=True", ValueError, (q, k, k), {}),
        ("key is list, expected a tensor", TypeError, (q, [1], k), {}),
        (r"value has shape \(8,\), expected \[..., H, L, E\]", ValueError, (q, q, q[0, 0, 0]), {}),
        ("mask requires a gradient", ValueError, (q, q, q), {"attn_mask": torch.ones(3, 3).requires_grad_()}),
    ]:  # fmt: skip
        with pytest.raises(error, match=message):
            scaled_dot_product_attention(*arguments, **kwargs)
