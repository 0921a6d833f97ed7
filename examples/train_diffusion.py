"""Train the denoiser of `onepass demo --only diffusion` on scikit-learn's digits.

    python examples/train_diffusion.py [--out FOLDER] [--steps N]

About four minutes on two cores. Noise is predicted on DDPM's schedule (Ho et al., 2020); one label in eight is dropped,
so that the model also serves classifier-free guidance (Ho and Salimans, 2022).
"""
from __future__ import annotations

import argparse
import copy
import math
import pathlib

import torch
from rich.progress import track
from torch.nn import functional as F

from onepass.demo import checkpoints, digits
from onepass.demo.models import CLASSES, Denoiser


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=checkpoints.FOLDER, help="folder of diffusion.safetensors")
    parser.add_argument("--steps", type=int, default=4000)
    args = parser.parse_args()

    torch.manual_seed(0)
    images, labels = digits.load()
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0).float()
    model = Denoiser().to(memory_format=torch.channels_last)
    average = copy.deepcopy(model).requires_grad_(False)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / 100, 0.5 * (1 + math.cos(math.pi * i / args.steps)))
    )
    loss_mean = 1.0
    for step in track(range(args.steps), description="diffusion"):
        rows = torch.randint(len(images), (128,))
        x, label = images[rows], labels[rows].clone()
        label[torch.rand(128) < 0.125] = CLASSES
        t = torch.randint(1000, (128,))
        noise = torch.randn_like(x)
        keep = alpha_bar[t][:, None, None, None]
        noisy = keep.sqrt() * x + (1 - keep).sqrt() * noise
        loss = F.mse_loss(model(noisy.to(memory_format=torch.channels_last), t, label), noise)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        decay = min(0.998, (step + 1) / (step + 10))
        with torch.no_grad():
            for mean, value in zip(average.parameters(), model.parameters(), strict=True):
                mean.lerp_(value, 1 - decay)
        loss_mean += (loss.item() - loss_mean) * 0.01
        if (step + 1) % 500 == 0:
            print(f"step {step + 1}: loss {loss_mean:.4f}")
    path = checkpoints.save(average, "diffusion", args.out)
    print(f"wrote {path}: {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
