"""A variational autoencoder on digits: every digit encoded, drawn many times, decoded; z and KL by either side."""
from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from .. import reparameterize_kl, rng
from . import checkpoints, digits, pictures
from .models import LATENT, VAE
from .workload import Bar, Figure, Result, Stopwatch, race

NAME = "vae"
TOLERANCE = 1e-3
_SEED = 7
_STREAM = 1 << 56  # where reparameterize_kl(seed=...) finds its noise in rng's counter space


def _stock_reparameterize(mean: Tensor, logvar: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    z = mean + torch.exp(0.5 * logvar) * noise
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(dim=1)
    return z, kl


def _latent_walk(model: VAE, mean: Tensor, labels: Tensor, steps: int = 12) -> Tensor:
    """Images [5 * steps, 8, 8] on straight lines from the mean of digit 2 k to that of 2 k + 1."""
    centre = torch.stack([mean[labels == digit].mean(0) for digit in range(10)])
    # The digit nearest to its class's centre: a real one is sharper than the centre itself.
    ends = torch.stack([mean[labels == digit][(mean[labels == digit] - centre[digit]).norm(dim=1).argmin()]
                        for digit in range(10)])
    at = torch.linspace(0, 1, steps, device=mean.device)[None, :, None]
    line = torch.lerp(ends[0::2, None], ends[1::2, None], at)
    return model.decode(line.flatten(0, 1))[:, 0]


def _median_ms(function: Callable[[], object], device: torch.device, repeats: int) -> float:
    times = []
    for _ in range(repeats + 1):
        watch = Stopwatch(device)
        with watch:
            function()
        times.append(watch.seconds)
    return statistics.median(times[1:]) * 1e3


@torch.inference_mode()
def run(device: torch.device, bar: Bar, quick: bool = False) -> Result:
    images, labels = (tensor.to(device) for tensor in digits.load())
    if quick:
        images, labels = images[:200], labels[:200]
    draws, repeats = (2, 1) if quick else (32, 9)
    model = VAE().to(device).eval()
    model.load_state_dict(checkpoints.load(NAME)[0])
    noise = rng.normal((len(images) * draws, LATENT), seed=_SEED, stream=_STREAM, device=device)

    def side(sample: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]) -> Callable[[Stopwatch], list[Tensor]]:
        def work(op: Stopwatch) -> list[Tensor]:
            mean, logvar = (part.repeat_interleave(draws, dim=0) for part in model.encode(images))
            with op:
                z, kl = sample(mean, logvar, noise)
            return [z, kl, model.decode(z)]
        return work

    ours = side(lambda mean, logvar, noise: reparameterize_kl(mean, logvar, noise=noise))
    stock, onepass, stock_side, onepass_side = race(side(_stock_reparameterize), ours, device, bar, repeats)

    z_error, kl_error, image_error = ((a - b).abs().max().item() for a, b in zip(stock, onepass, strict=True))
    agrees = max(z_error, kl_error / stock[1].abs().max().item(), image_error) < TOLERANCE

    mean, logvar = (part.repeat_interleave(draws, dim=0) for part in model.encode(images))
    same = torch.equal(reparameterize_kl(mean, logvar, seed=_SEED)[0], onepass[0])
    torch_ms = _median_ms(lambda: _stock_reparameterize(mean, logvar, torch.randn_like(mean)), device, repeats)
    own_ms = _median_ms(lambda: reparameterize_kl(mean, logvar, seed=_SEED), device, repeats)

    grey = lambda x: (x + 1) / 2
    shown = torch.stack([(labels == digit).nonzero()[0, 0] for digit in range(10)])
    again = onepass[2].unflatten(0, (len(images), draws))[shown, :2, 0]
    pairs = torch.cat((images[shown, 0], again[:, 0], again[:, 1]))
    prior = rng.normal((60, LATENT), seed=_SEED, stream=1, device=device)
    return Result(
        name=NAME,
        what=f"encode {len(images)} digits, draw {draws} latents of each with their KL, decode {len(noise):,} images",
        op="reparameterize_kl",
        stock=stock_side,
        onepass=onepass_side,
        agrees=agrees and same,
        agreement=f"within {image_error:.0e}",
        notes=[
            f"z differs by {z_error:.1e} at most, the KL by {kl_error:.1e} nats, a pixel by {image_error:.1e}.",
            f"Drawing the noise too: torch.randn and the formula {torch_ms:.2f} ms, "
            f"onepass with seed={_SEED} {own_ms:.2f} ms. "
            + ("Its z has the bits of the noise tensor's." if same else "Its z is NOT that of the noise tensor."),
        ],
        figures=[
            Figure("Reconstructions", "Top: a digit. Below: two of its draws, decoded.",
                   pictures.grid(grey(pairs), 10, 38), "image/png"),
            Figure("Samples", "Latents drawn from the standard normal, decoded.",
                   pictures.grid(grey(model.decode(prior)[:, 0]), 12, 31), "image/png"),
            Figure("A latent walk", "From one digit to the next on a straight line in the latent space.",
                   pictures.grid(grey(_latent_walk(model, mean[::draws], labels)), 12, 31), "image/png"),
        ],
    )
