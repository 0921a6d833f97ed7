"""Train the variational autoencoder of `onepass demo --only vae` on scikit-learn's digits.

    python examples/train_vae.py [--out FOLDER] [--steps N]

About a minute on two cores.
"""
from __future__ import annotations

import argparse
import math
import pathlib

import torch
from rich.progress import track

from onepass.demo import checkpoints, digits
from onepass.demo.models import VAE

SIGMA = 0.3  # the decoder's standard deviation: what weighs reconstruction against the KL


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=checkpoints.FOLDER, help="folder of vae.safetensors")
    parser.add_argument("--steps", type=int, default=12000)
    args = parser.parse_args()

    torch.manual_seed(0)
    images, _ = digits.load()
    model = VAE()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 0.5 * (1 + math.cos(math.pi * i / args.steps)))
    error_mean = kl_mean = 0.0
    for step in track(range(args.steps), description="vae"):
        x = images[torch.randint(len(images), (128,))]
        mean, logvar = model.encode(x)
        z = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
        error = (model.decode(z) - x).square().sum(dim=(1, 2, 3)).mean()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(dim=1).mean()
        loss = error / (2 * SIGMA**2) + kl
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
        error_mean += (error.item() / 64 - error_mean) * 0.01
        kl_mean += (kl.item() - kl_mean) * 0.01
        if (step + 1) % 2000 == 0:
            print(f"step {step + 1}: squared error {error_mean:.4f} a pixel, KL {kl_mean:.2f} nats an image")
    path = checkpoints.save(model, "vae", args.out)
    print(f"wrote {path}: {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
