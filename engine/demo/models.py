"""The two digit models: an autoencoder and a class-conditional denoiser. Images are [B, 1, 8, 8] in [-1, 1]."""
from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LATENT = 8
CLASSES = 10  # the denoiser's label CLASSES means no label


class VAE(nn.Module):
    """Encoder to the mean and log variance of a diagonal Gaussian, decoder back to pixels (Kingma & Welling, 2013)."""

    def __init__(self, latent: int = LATENT, width: int = 256) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Flatten(),
            nn.Linear(64, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2 * latent),
        )
        self.decoder = nn.Sequential(
            nn.Linear(latent, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 64), nn.Tanh()
        )

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """mean and log variance, each [B, latent]."""
        mean, logvar = self.encoder(images).chunk(2, dim=-1)
        return mean, logvar

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(z).unflatten(-1, (1, 8, 8))


class Residual(nn.Module):
    """Two 3 x 3 convolutions around a shift and scale that the condition chooses."""

    def __init__(self, before: int, after: int, condition: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(8, before)
        self.conv1 = nn.Conv2d(before, after, 3, padding=1)
        self.modulate = nn.Linear(condition, 2 * after)
        self.norm2 = nn.GroupNorm(8, after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1)
        self.skip = nn.Conv2d(before, after, 1) if before != after else nn.Identity()

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.modulate(condition)[:, :, None, None].chunk(2, dim=1)
        h = self.norm2(h) * (1 + scale) + shift
        return self.skip(x) + self.conv2(F.silu(h))


class Denoiser(nn.Module):
    """A U-Net of two resolutions that predicts the noise in `x` at time `t` (0 to 999) of class `label`."""

    rate: Tensor

    def __init__(self, width: int = 32, condition: int = 64) -> None:
        super().__init__()
        self.label = nn.Embedding(CLASSES + 1, condition)
        self.time = nn.Sequential(nn.Linear(64, condition), nn.SiLU(), nn.Linear(condition, condition))
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.down = Residual(width, width, condition)
        self.shrink = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.middle = nn.ModuleList(Residual(2 * width, 2 * width, condition) for _ in range(3))
        self.grow = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.up = Residual(2 * width, width, condition)
        self.head = nn.Sequential(nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, 1, 3, padding=1))
        rate = torch.exp(-math.log(10000) * torch.arange(32) / 32)
        self.register_buffer("rate", rate, persistent=False)

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        angle = t[:, None].float() * self.rate
        condition = F.silu(self.time(torch.cat((angle.sin(), angle.cos()), dim=1)) + self.label(label))
        full = self.down(self.stem(x), condition)
        half = self.shrink(full)
        for block in self.middle:
            half = block(half, condition)
        return self.head(self.up(torch.cat((full, self.grow(half)), dim=1), condition))
