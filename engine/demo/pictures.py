"""Tensors to encoded pictures: PNG for one image, animated PNG for a film."""
from __future__ import annotations

import io

import torch
from PIL import Image
from torch import Tensor

_GAP = 4  # pixels between the tiles of a grid, transparent


def _to_image(pixels: Tensor) -> Image.Image:
    """`pixels` [H, W] or [H, W, 3] in [0, 1]."""
    return Image.fromarray((pixels.detach().cpu().clamp(0, 1) * 255).round().to(torch.uint8).numpy())


def _png(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True, **options)
    return buffer.getvalue()


def grid(
    images: Tensor,     # [N, H, W] or [N, H, W, 3] in [0, 1], filled row by row
    columns: int,
    tile: int,          # pixels of a tile's side; enlarged smoothly
) -> bytes:
    rows = -(-len(images) // columns)
    sheet = Image.new("RGBA", (columns * (tile + _GAP) - _GAP, rows * (tile + _GAP) - _GAP))
    for i, pixels in enumerate(images):
        small = _to_image(pixels).resize((tile, tile), Image.Resampling.BICUBIC)
        sheet.paste(small, (i % columns * (tile + _GAP), i // columns * (tile + _GAP)))
    return _png(sheet)


def film(
    frames: Tensor,     # [N, H, W, 3] in [0, 1]
    milliseconds: int,  # a frame
) -> bytes:
    first, *rest = (_to_image(frame) for frame in frames)
    return _png(first, save_all=True, append_images=rest, duration=milliseconds, loop=0)
