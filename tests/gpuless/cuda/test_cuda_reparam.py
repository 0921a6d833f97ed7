"""Random numbers and reparameterized sampling in CUDA: the reference's bits, and the errors that PyTorch has."""
from __future__ import annotations

import pytest
import torch

import onepass
from onepass.reference.rng import DISTRIBUTIONS

import cases
from test_reparam import assert_values_and_gradients, inputs, plain


@pytest.mark.parametrize("dtype", cases.FLOATS)
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_random_numbers_have_the_references_bits(name, dtype, device):
    for shape in cases.SHAPES:
        rows = shape[0]
        keys = (
            {"seed": 0x123456789ABCDEF0, "stream": 7, "offset": 2**32 - 2},
            {"seed": torch.arange(rows) * 2**33 - 1, "stream": torch.arange(rows) + 5, "offset": 3},
        )
        for key in keys:
            there = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in key.items()}
            draw = getattr(onepass.rng, name)
            got = draw(shape, **there, dtype=dtype, device=device, backend="cuda")
            assert torch.equal(got.cpu(), draw(shape, **key, dtype=dtype, backend="reference")), (shape, key)


def test_bits_are_the_words_themselves(device):
    """Those too that are a NaN where they pass through float registers."""
    for shape in cases.SHAPES:
        for seed in (-1, torch.arange(shape[0]) * 2**33 - 1):
            there = seed.to(device) if isinstance(seed, torch.Tensor) else seed
            got = onepass.rng.bits(shape, seed=there, stream=5, offset=2**32 - 2, device=device, backend="cuda")
            want = onepass.rng.bits(shape, seed=seed, stream=5, offset=2**32 - 2, backend="reference")
            assert got.dtype == torch.int32 and torch.equal(got.cpu(), want)
    many = onepass.rng.bits((1, 2**16), seed=3, device=device, backend="cuda")
    floats = many.view(torch.float32)
    assert (floats.isnan() & (many & 0x400000 == 0)).any(), "no signalling NaN among the words"
    assert torch.equal(many.cpu(), onepass.rng.bits((1, 2**16), seed=3, backend="reference"))


@pytest.mark.parametrize("dtype", cases.FLOATS)
@pytest.mark.parametrize("shape", cases.SHAPES)
def test_values_and_gradients(shape, dtype, device):
    assert_values_and_gradients(shape, dtype, device, "cuda")


@pytest.mark.parametrize("dtype", cases.FLOATS)
@pytest.mark.parametrize("shape", [(5, 1031), (7, 6), (3, 2056), (2, 9001)])
def test_the_noise_is_the_keys_own_wherever_a_row_begins(shape, dtype, device):
    """One key for the tensor: rows begin inside a block of four; a key a row: each begins one."""
    mean, logvar, _ = inputs(shape, dtype)
    for seed in (7, torch.arange(shape[0]) - 2):
        there = seed.to(device) if isinstance(seed, torch.Tensor) else seed
        noise = onepass.rng.normal(shape, seed=seed, stream=(1 << 56) + 3, dtype=torch.float32, backend="reference")
        results = []
        for backend, where, key in (("cuda", device, there), ("reference", "cpu", seed)):
            leaves = [x.to(where).detach().clone().requires_grad_() for x in (mean, logvar)]
            z, kl = onepass.reparameterize_kl(*leaves, seed=key, stream=3, backend=backend)
            grads = torch.autograd.grad((z.float().sum(), kl.sum()), leaves)
            results.append([x.detach().cpu() for x in (z, kl, *grads)])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=2 * torch.finfo(b.dtype).eps, atol=1e-5)
        exact = plain(mean.double(), logvar.double(), noise.double())
        torch.testing.assert_close(results[0][0].double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


def test_views_of_rows_take_the_scalar_path(device):
    """Odd offsets and strides: no 16-byte access is aligned; nothing beside the result is written."""
    base = torch.randn(3, 5, 1300, generator=torch.Generator().manual_seed(3))
    for dtype in cases.FLOATS:
        mean, logvar, noise = base.to(device, dtype)[..., 3:1290].unbind()
        out = torch.full((5, 1300), torch.nan, dtype=dtype, device=device)
        z, kl = onepass.reparameterize_kl(mean, logvar, noise=noise, out=out[:, 7:1294], backend="cuda")
        copies = [x.contiguous() for x in (mean, logvar, noise)]
        again = onepass.reparameterize_kl(copies[0], copies[1], noise=copies[2], backend="cuda")
        assert torch.equal(z, again[0]) and torch.equal(kl, again[1])
        assert out[:, :7].isnan().all() and out[:, 1294:].isnan().all()


def test_rows_do_not_depend_on_the_batch(device):
    for shape in ((6, 3, 4099), (9, 100)):
        mean, logvar, _ = (x.to(device) for x in inputs(shape))
        seeds = torch.arange(shape[0], device=device) + 2**33
        run = lambda m, v, s: onepass.reparameterize_kl(m, v, seed=s, backend="cuda")
        z, kl = run(mean, logvar, seeds)
        assert all(map(torch.equal, run(mean, logvar, seeds), (z, kl)))
        for b in range(shape[0]):
            z1, kl1 = run(mean[b : b + 1], logvar[b : b + 1], seeds[b : b + 1])
            assert torch.equal(z1[0], z[b]) and torch.equal(kl1[0], kl[b])
