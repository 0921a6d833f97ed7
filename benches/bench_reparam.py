"""Reparameterized sampling: z and the KL of a VAE's latents, from the encoder's output [B, 2C, H, W], and gradients.

Stock code draws with torch.randn, so its values differ by design; ours are held to the reference with our own noise.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import onepass
from onepass.reference import reparam as reference
from onepass.reparam import STREAM_TAG

from .harness import COMPILED, Case
from .timing import Run

SEED = 7
SHAPES = ((64, 4, 64, 64), (8, 16, 32, 32))
ROWS, LATENTS, SAMPLES = 2048, 256, 8
CLAMP = (-30.0, 20.0)  # diffusers'
Sample = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def cases(device: torch.device) -> Iterator[Case]:
    for shape, dtype in itertools.product(SHAPES, (torch.float32, torch.bfloat16)):
        yield _forward(shape, dtype)
        yield _with_gradients(shape, dtype)
    yield _many_samples()


def _stock(mean: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    return _by_hand(mean, logvar, torch.randn_like(mean))


def _same_noise(mean: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    noise = onepass.rng.normal(mean.shape, seed=SEED, stream=STREAM_TAG << 56, device=mean.device, backend="reference")
    return _by_hand(mean, logvar, noise.to(mean.dtype))


def _by_hand(mean: Tensor, logvar: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    m, lv = mean.float(), logvar.float()
    return mean + torch.exp(0.5 * logvar) * noise, 0.5 * (m * m + lv.exp() - 1.0 - lv).sum(dim=[1, 2, 3])


def _ours(mean: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    return onepass.reparameterize_kl(mean, logvar, seed=SEED)


def _reference(mean: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    return reference.reparameterize(mean, logvar, None, SEED, None, STREAM_TAG << 56, None, 0, None, True)


def _diffusers(parameters: Tensor) -> tuple[Tensor, Tensor]:
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    posterior = DiagonalGaussianDistribution(parameters)
    return posterior.sample(), posterior.kl()


def _split(sample: Sample, parameters: Tensor) -> tuple[Tensor, Tensor]:
    return sample(*parameters.chunk(2, 1))


def _gradients(sample: Sample, mean: Tensor, logvar: Tensor, dz: Tensor, dkl: Tensor) -> tuple[Tensor, ...]:
    outputs = sample(mean, logvar)
    return torch.autograd.grad(outputs, (mean, logvar), (dz, dkl.to(outputs[1].dtype)))


def _forward(shape: tuple[int, ...], dtype: torch.dtype) -> Case:
    n = math.prod(shape)
    batch, channels, *image = shape
    implementations: dict[str, Run] = {
        "onepass": functools.partial(_split, _ours),
        "eager": functools.partial(_split, _stock),
    }
    if importlib.util.find_spec("diffusers"):
        implementations["diffusers"] = _diffusers
    return Case(
        op="reparameterize_kl",
        name=_name("z_kl", shape, dtype),
        shape="x".join(map(str, shape)),
        dtype=dtype,
        make=lambda device: (torch.randn(batch, 2 * channels, *image, device=device).to(dtype),),
        implementations=implementations,
        reference=functools.partial(_split, _reference),
        yardstick=functools.partial(_split, _same_noise),
        uncompared=frozenset({"eager", "diffusers", COMPILED}),
        reads=2 * n * dtype.itemsize,
        writes=n * dtype.itemsize,
        formula="reads mean and logvar, writes z: 3 accesses an element; drawing the noise is not counted as FLOPs",
        quick=shape == SHAPES[0],
    )


def _with_gradients(shape: tuple[int, ...], dtype: torch.dtype) -> Case:
    n = math.prod(shape)

    def make(device: torch.device) -> tuple:
        mean, logvar, dz = (torch.randn(shape, device=device).to(dtype) for _ in range(3))
        return mean.requires_grad_(), logvar.requires_grad_(), dz, torch.rand(shape[0], device=device)

    return Case(
        op="reparameterize_kl",
        name=_name("z_kl_grad", shape, dtype),
        shape="x".join(map(str, shape)),
        dtype=dtype,
        make=make,
        implementations={
            "onepass": functools.partial(_gradients, _ours),
            "eager": functools.partial(_gradients, _stock),
        },
        reference=functools.partial(_gradients, _reference),
        yardstick=functools.partial(_gradients, _same_noise),
        uncompared=frozenset({"eager", COMPILED}),
        reads=5 * n * dtype.itemsize,
        writes=3 * n * dtype.itemsize,
        formula="forward 3 accesses an element, backward 5 (reads dz, mean, logvar; writes two gradients)",
        quick=shape == SHAPES[0],
    )


def _many_samples() -> Case:
    """K samples of each row, the encoder's output in one tensor, its logvar clamped: an importance weighted bound's."""
    n = ROWS * LATENTS

    def ours(parameters: Tensor, backend: str | None = None) -> tuple[Tensor, Tensor]:
        return onepass.reparameterize_kl(parameters, clamp=CLAMP, samples=SAMPLES, seed=SEED, backend=backend)

    def with_noise(parameters: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        mean, logvar = parameters.chunk(2, 1)
        logvar = logvar.clamp(*CLAMP)
        return mean + torch.exp(0.5 * logvar) * noise, 0.5 * (mean * mean + logvar.exp() - 1.0 - logvar).sum(1)

    def same_noise(parameters: Tensor) -> tuple[Tensor, Tensor]:
        draws = [
            onepass.rng.normal(
                (ROWS, LATENTS), seed=SEED, stream=STREAM_TAG << 56, offset=k << 40, device=parameters.device,
                backend="reference",
            )
            for k in range(SAMPLES)
        ]
        return with_noise(parameters, torch.stack(draws))

    return Case(
        op="reparameterize_kl",
        name="z_kl_k8_fp32",
        shape=f"{ROWS}x{LATENTS} K{SAMPLES}",
        dtype=torch.float32,
        make=lambda device: (torch.randn(ROWS, 2 * LATENTS, device=device),),
        implementations={
            "onepass": ours,
            "eager": lambda p: with_noise(p, torch.randn(SAMPLES, ROWS, LATENTS, device=p.device)),
        },
        reference=functools.partial(ours, backend="reference"),
        yardstick=same_noise,
        uncompared=frozenset({"eager", COMPILED}),
        reads=2 * 4 * n,
        writes=SAMPLES * 4 * n,
        formula="reads mean and logvar, writes K samples of z; drawing the noise is not counted as FLOPs",
        quick=False,
    )


def _name(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> str:
    return f"{kind}_b{shape[0]}_{'fp32' if dtype is torch.float32 else 'bf16'}"
