"""Few rows of half types against an int8 cache: AVX-512 takes bfloat16 as whole numbers, at no cost of accuracy."""

from __future__ import annotations

import pytest
import torch

import onepass

from helpers import needs_native

pytestmark = needs_native
HALVES = (torch.bfloat16, torch.float16)
KEYS, HEADS, KV_HEADS, DIM = 700, 8, 2, 128


def inputs(dtype: torch.dtype, keys: int = KEYS):
    """q [1, 1, H, D], codes [1, keys, Hkv, D] of keys and values, scales [1, keys, Hkv] of both."""
    generator = torch.Generator().manual_seed(5)
    q = torch.randn(1, 1, HEADS, DIM, generator=generator).to(dtype)
    k, v = (torch.randint(-127, 128, (1, keys, KV_HEADS, DIM), generator=generator, dtype=torch.int8) for _ in "kv")
    scales = [torch.rand(1, keys, KV_HEADS, generator=generator) * 0.02 + 0.005 for _ in "kv"]
    return q, k, v, *scales


def attend(q, k, v, k_scale, v_scale):
    return onepass.attention_with_kvcache(
        q, k, v, cache_seqlens=k.shape[1], k_scale=k_scale, v_scale=v_scale, return_lse=True, backend="cpu"
    )


def truth(q, k, v, k_scale, v_scale):
    """The attention of the values that the codes stand for, in float64."""
    k, v = (codes.double() * scale.double()[..., None] for codes, scale in ((k, k_scale), (v, v_scale)))
    return onepass.attention(q.double(), k, v, return_lse=True, backend="reference")


def assert_rounded(got, exact, dtype):
    """Off by no more than the result's own rounding of its largest number, twice."""
    error = (got[0].double() - exact[0]).abs().max() / exact[0].abs().max()
    assert error <= torch.finfo(dtype).eps, float(error)
    assert (got[1].double() - exact[1]).abs().max() <= 2e-3


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("size", [1e-12, 1e-3, 1.0, 40.0])
def test_queries_of_any_size(size, dtype):
    q, *cache = inputs(dtype)
    q = (q * size).to(dtype)
    assert_rounded(attend(q, *cache), truth(q, *cache), dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_channel_that_outweighs_the_others(dtype):
    """Language models have them: the other channels still count."""
    q, k, *rest = inputs(dtype)
    q[..., 7] = 100.0
    k[..., 7] = 1
    assert_rounded(attend(q, k, *rest), truth(q, k, *rest), dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_many_small_weights_beside_a_large_one(dtype):
    """One key has as much weight as 4000 others together: none of theirs is rounded away."""
    q, k, v, k_scale, v_scale = inputs(dtype, 4001)
    q[:] = 1.0
    k[:], k[:, 77] = 0, 1
    k_scale[:] = 8.3 / (DIM * DIM**-0.5)
    v[:, 77] = 0
    v[:, torch.arange(4001) != 77] = 64
    exact = truth(q, k, v, k_scale, v_scale)
    assert 0.3 < exact[0].abs().max() / (64 * v_scale.mean()) < 0.7
    assert_rounded(attend(q, k, v, k_scale, v_scale), exact, dtype)


@pytest.mark.parametrize("least", [1e-3, 1e-8])
def test_value_scales_that_differ_by_token(least):
    q, k, v, k_scale, v_scale = inputs(torch.bfloat16)
    v_scale[:, ::3] *= least
    v_scale[:, 5] = 0
    cache = k, v, k_scale, v_scale
    assert_rounded(attend(q, *cache), truth(q, *cache), torch.bfloat16)
    assert torch.equal(attend(q, k, v, k_scale, torch.zeros_like(v_scale))[0], torch.zeros_like(q))


def test_values_near_the_least_of_bfloat16():
    q, k, v, k_scale, v_scale = inputs(torch.bfloat16)
    cache = k, v, k_scale, v_scale * 1e-29
    assert_rounded(attend(q, *cache), truth(q, *cache), torch.bfloat16)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_only_the_row_of_a_bad_number_is_nan(bad):
    q, *cache = inputs(torch.bfloat16)
    clean, broken = attend(q, *cache), q.clone()
    broken[0, 0, 2, 3] = bad
    out, lse = attend(broken, *cache)
    others = torch.arange(HEADS) != 2
    assert out[0, 0, 2].isnan().all() and lse[0, 2].isnan().all()
    assert torch.equal(out[:, :, others], clean[0][:, :, others]) and torch.equal(lse[:, others], clean[1][:, others])


def test_a_bad_scale_shows():
    q, k, v, k_scale, v_scale = inputs(torch.bfloat16)
    v_scale[0, 650, 1] = torch.nan
    out, _ = attend(q, k, v, k_scale, v_scale)
    assert out[:, :, HEADS // 2 :].isnan().all() and out[:, :, : HEADS // 2].isfinite().all()
