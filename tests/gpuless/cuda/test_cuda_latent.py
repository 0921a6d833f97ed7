"""Posterior samples with options in CUDA: the reference's noise, float64's values and gradients, where operands lie."""
from __future__ import annotations

import itertools
import math

import pytest
import torch

import onepass
from onepass.reference.latent import SAMPLE_STEP

import cases
from helpers import assert_as_good_as_torch

# Rows of a warp, of a block, of several tiles with a tail; none of the odd ones begins on 16 bytes.
SHAPES = ((5, 6), (3, 4, 2, 6), (2, 513), (3, 2, 1100), (2, 4099), (0, 4), (3, 0))
OPTIONS = {
    "none": {"samples": 3},
    "row": {"beta": 0.3, "free_bits": 0.25},
    "element": {"samples": 2, "antithetic": True, "beta": 0.3, "free_bits": 0.25},
    "weights": {"samples": 4, "antithetic": True},
    "weights of each": {"samples": 3},
}


def arguments(shape, dtype, name, prior, given=True):
    """The core op's, on the host."""
    g = torch.Generator().manual_seed(len(shape))
    options = {"samples": 0, "antithetic": False, "beta": 1.0, "free_bits": -math.inf, **OPTIONS[name]}
    draws = max(options["samples"], 1) // (2 if options["antithetic"] else 1)
    drawn = (draws, *shape) if options["samples"] else shape
    make = lambda size, scale: (scale * torch.randn(size, generator=g)).to(dtype)
    operands = [make(shape, 1.0), make(shape, 0.7), make(drawn, 1.0) if given else None]
    beside = [make(shape, 1.0), make(shape, 0.5)] if prior else [None, None]
    key = [7, None, 1 << 56, None, 3, None]
    return [*operands, *key, *beside, 1, -0.75, 0.75, options["samples"], options["antithetic"], name.split()[0],
            options["beta"], options["free_bits"]]


def to(args, device, dtype=None):
    return [x.to(device, dtype or x.dtype) if isinstance(x, torch.Tensor) else x for x in args]


def results(args, grads, backend):
    """Forward's tensors and backward's."""
    forward = torch.ops.onepass.latent_sample(*args, backend=backend)
    prior = args[9] is not None
    backward = torch.ops.onepass.latent_sample_backward(*grads, *args, args[2] is not None, prior, backend=backend)
    return [x.cpu() for x in (*forward, *backward)]


def gradients(args, outputs):
    g = torch.Generator().manual_seed(2)
    return [torch.randn(x.shape, generator=g).to(x.dtype) if x.numel() else None for x in outputs]


@pytest.mark.parametrize(("name", "prior"), [("none", False), *itertools.product(list(OPTIONS)[1:], (False, True))])
@pytest.mark.parametrize("dtype", cases.FLOATS)
def test_values_and_gradients(dtype, name, prior, device):
    """As near to float64 as the reference in the dtype, whose arithmetic is PyTorch's in float32."""
    for shape in SHAPES:
        args = arguments(shape, dtype, name, prior)
        outputs = torch.ops.onepass.latent_sample(*args, backend="reference")
        grads = gradients(args, outputs)
        same = results(args, grads, "reference")
        truth = results(to(args, "cpu", torch.float64), to(grads, "cpu", torch.float64), "reference")
        got = results(to(args, device), to(grads, device), "cuda")
        again = results(to(args, device), to(grads, device), "cuda")
        assert all(map(torch.equal, got, again))
        parts = ("z", "first", "second", "mean", "logvar", "noise", "prior_mean", "prior_logvar")
        for part, a, b, c in zip(parts, got, same, truth, strict=True):
            assert a.dtype == b.dtype
            assert_as_good_as_torch(a, b, c, f"{part} of {shape}")


@pytest.mark.parametrize("dtype", cases.FLOATS)
@pytest.mark.parametrize("shape", [(5, 1031), (7, 6), (3, 2056), (2, 9001)])
def test_the_noise_is_the_keys_own_to_the_bit(shape, dtype, device):
    """Of mean 0 and logvar 0 a sample is its noise, in every draw and wherever a row begins in a block of four."""
    zeros = torch.zeros(shape, dtype=dtype, device=device)
    for seed in (7, torch.arange(shape[0]) - 2):
        key = {"seed": seed.to(device) if isinstance(seed, torch.Tensor) else seed, "stream": 3, "offset": 5}
        z = onepass.reparameterize(zeros, zeros, samples=3, **key, backend="cuda").cpu()
        pairs = onepass.reparameterize(zeros, zeros, samples=4, antithetic=True, **key, backend="cuda").cpu()
        for k in range(3):
            later = {"seed": seed, "stream": (1 << 56) + 3, "offset": 5 + k * SAMPLE_STEP, "dtype": dtype}
            noise = onepass.rng.normal(shape, **later, backend="reference")
            assert torch.equal(z[k], noise)
            assert k == 2 or (torch.equal(pairs[2 * k], noise) and torch.equal(pairs[2 * k + 1], -noise))


@pytest.mark.parametrize("dtype", cases.FLOATS)
@pytest.mark.parametrize("chunk_dim", [0, 1, 2, 3])
def test_chunks_are_read_and_their_gradients_written_where_they_lie(chunk_dim, dtype, device):
    """Segments shorter than a pack, and as long; begun at any element: the values of two tensors side by side."""
    for shape in ((2, 6, 4, 6), (4, 2, 6, 70), (2, 10, 34, 20)):
        g = torch.Generator().manual_seed(3)
        both, on_z, on_kl = (torch.randn(size, generator=g) for size in (shape, shape, shape[:1]))
        half = shape[chunk_dim] // 2
        on_z = on_z.narrow(chunk_dim, 0, half).to(device, dtype)
        rows = half if chunk_dim == 0 else shape[0]
        seeds = (torch.arange(rows) + 2**40).to(device)
        runs = []
        for parameters in (both.to(device, dtype), torch.nn.functional.pad(both, (1, 2)).to(device, dtype)[..., 1:-2]):
            leaf = parameters.detach().requires_grad_()
            apart = [x.contiguous().detach().requires_grad_() for x in leaf.chunk(2, chunk_dim)]
            for operands in (apart, [leaf]):
                options = {"chunk_dim": chunk_dim} if len(operands) == 1 else {}
                outputs = onepass.reparameterize_kl(*operands, **options, seed=seeds, clamp=(-1, 1), backend="cuda")
                grads = torch.autograd.grad(outputs, operands, (on_z, on_kl[:rows].to(device)))
                runs.append((*outputs, *(grads if len(grads) == 2 else grads[0].chunk(2, chunk_dim))))
        for run in runs[1:]:
            assert all(map(torch.equal, runs[0], run))


def test_nothing_but_the_result_is_written(device):
    """Results that begin anywhere: what lies beside them stays as it is."""
    for dtype in cases.FLOATS:
        base = torch.full((2, 12, 101), math.nan, dtype=dtype, device=device)
        out = base[:, 3:9, 7:95]
        z = onepass.reparameterize(torch.ones_like(out), torch.zeros_like(out), clamp=(-1, 1), seed=1, out=out,
                                   backend="cuda")
        assert z.data_ptr() == out.data_ptr() and out.isfinite().all()
        assert base.isnan().sum() == base.numel() - out.numel()


def test_rows_do_not_depend_on_the_batch(device):
    for shape in ((5, 6, 7), (40, 2, 3), (3, 2, 2500)):
        g = torch.Generator().manual_seed(4)
        parameters, seeds = torch.randn(shape, generator=g).to(device), (torch.arange(shape[0]) + 2**35).to(device)
        run = lambda x, s: onepass.reparameterize_log_weights(x, samples=3, seed=s, backend="cuda")
        whole = run(parameters, seeds)
        for b in range(0, shape[0], 1 + shape[0] // 5):
            alone = run(parameters[b : b + 1], seeds[b : b + 1])
            assert all(torch.equal(x[:, 0], y[:, b]) for x, y in zip(alone, whole, strict=True))
