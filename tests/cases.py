"""Shapes and dtypes that the tests share: one section a stem."""
import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16)

# ---- reparam, rng: one vector, odd tails, several tiles of a row, zero sizes ----
SHAPES = ((1,), (3, 5), (2, 4, 8, 8), (5, 1031), (2, 9001), (0, 7), (4, 0))

# ---- denoise: latents, images, odd tails, several tiles of a row, zero sizes ----
LATENTS = ((1,), (7,), (2, 4, 8, 8), (3, 3, 5, 7), (9, 2, 41, 53), (2, 5003), (0, 4, 8, 8), (3, 0))

# ---- volrend: rays, samples, channels; one vector, tails, many vectors, every way to sum channels, zero sizes ----
RAYS = (
    (4, 16, 3), (5, 1, 3), (24, 77, 1), (24, 77, 2), (24, 40, 4), (24, 40, 7), (24, 33, 70), (70, 150, 3),
    (0, 7, 3), (3, 0, 2),
)
