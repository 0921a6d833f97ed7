"""Train a variational autoencoder on scikit-learn's digits twice, z and KL by plain PyTorch and by onepass.

    python examples/compare_vae.py [--steps N] [--seeds N]

Prints the loss curves of both over several seeds with whether they agree, and the time and peak memory of a step. The
latent has 16 channels at full resolution: what z and KL cost shows.
"""
from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import onepass
from onepass.demo import digits

BATCH, CHANNELS = 128, 16
SIGMA = 0.3         # the decoder's standard deviation: what weighs reconstruction against the KL
WINDOW = 20         # steps that a point of a curve averages

Sample = Callable[[Tensor], tuple[Tensor, Tensor]]      # parameters to z and the KL of each row


class VAE(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        conv = lambda a, b: nn.Conv2d(a, b, 3, padding=1)
        self.encoder = nn.Sequential(conv(1, width), nn.SiLU(), conv(width, 2 * CHANNELS))
        self.decoder = nn.Sequential(conv(CHANNELS, width), nn.SiLU(), conv(width, 1), nn.Tanh())

    def loss(self, images: Tensor, sample: Sample) -> Tensor:
        z, kl = sample(self.encoder(images))
        error = (self.decoder(z) - images).square().sum(dim=(1, 2, 3))
        return (error / (2 * SIGMA**2) + kl).mean()


def stock() -> Sample:
    """What a VAE's author writes."""

    def sample(parameters: Tensor) -> tuple[Tensor, Tensor]:
        mean, logvar = parameters.chunk(2, 1)
        logvar = logvar.clamp(-30.0, 20.0)
        z = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
        return z, 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(dim=(1, 2, 3))

    return sample


def fused() -> Sample:
    """The same in one call: forward keeps `parameters` alone, backward draws the noise again."""
    generator = onepass.rng.Generator()
    return lambda parameters: onepass.reparameterize_kl(parameters, clamp=(-30.0, 20.0), generator=generator)


SIDES: dict[str, Callable[[], Sample]] = {"stock": stock, "onepass": fused}


def trainer(images: Tensor, side: str, seed: int) -> Callable[[], float]:
    """A training step that returns its loss.

    The sides of a seed begin with the same weights and see the same images; their noise differs.
    """
    torch.manual_seed(seed)
    model, sample = VAE(), SIDES[side]()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    order = torch.Generator().manual_seed(seed)

    def step() -> float:
        batch = images[torch.randint(len(images), (BATCH,), generator=order)]
        optimizer.zero_grad()
        loss = model.loss(batch, sample)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def curve(images: Tensor, side: str, seed: int, count: int) -> list[float]:
    """Mean losses of windows of training steps."""
    step = trainer(images, side, seed)
    losses = [step() for _ in range(count)]
    return [statistics.fmean(losses[i : i + WINDOW]) for i in range(0, count, WINDOW)]


def distances(curves: dict[str, list[list[float]]]) -> list[float]:
    """At every point of the curves, how far apart the sides' means over seeds are, in standard errors (Welch's t)."""
    found = []
    for a, b in zip(zip(*curves["stock"], strict=True), zip(*curves["onepass"], strict=True), strict=True):
        error = math.sqrt(statistics.variance(a) / len(a) + statistics.variance(b) / len(b))
        found.append((statistics.fmean(b) - statistics.fmean(a)) / error)
    return found


def milliseconds(images: Tensor, repeats: int) -> dict[str, float]:
    """Median time of a training step, the sides in turn."""
    steps = {side: trainer(images, side, 0) for side in SIDES}
    times: dict[str, list[float]] = {side: [] for side in SIDES}
    for i in range(repeats + 3):
        for side, step in steps.items():
            start = time.perf_counter()
            step()
            if i >= 3:
                times[side].append((time.perf_counter() - start) * 1e3)
    return {side: statistics.median(values) for side, values in times.items()}


def peak_bytes(images: Tensor, side: str) -> int:
    """The most that the tensors of z, the KL and their backward take at a time, beyond what was there."""
    parameters = VAE().encoder(images[:BATCH]).detach().requires_grad_()
    sample = SIDES[side]()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        z, kl = sample(parameters)
        torch.autograd.backward((z, kl), (torch.ones_like(z), torch.ones_like(kl)))
    events = sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    held = peak = 0
    for event in events:
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=6)
    args = parser.parse_args()
    images, _ = digits.load()
    curves = {side: [curve(images, side, seed, args.steps) for seed in range(args.seeds)] for side in SIDES}
    apart = distances(curves)
    print(f"loss, nats an image: mean of {args.seeds} seeds; distance in standard errors of their difference")
    print(f"{'step':>6}{'stock':>10}{'onepass':>10}{'distance':>10}")
    means = {side: [statistics.fmean(point) for point in zip(*runs, strict=True)] for side, runs in curves.items()}
    for i in range(0, len(apart), max(1, len(apart) // 8)):
        both = f"{means['stock'][i]:>10.2f}{means['onepass'][i]:>10.2f}"
        print(f"{min((i + 1) * WINDOW, args.steps):>6}{both}{apart[i]:>10.2f}")
    print(f"largest distance {max(map(abs, apart)):.2f} of {len(apart)} points")
    took = milliseconds(images, 40)
    peak = {side: peak_bytes(images, side) for side in SIDES}
    for side in SIDES:
        held = f"z, KL and their backward hold {peak[side] / 1e6:.2f} MB"
        print(f"{side:>8}: {took[side]:.2f} ms a training step; {held}")


if __name__ == "__main__":
    main()
