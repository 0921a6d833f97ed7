"""Shapes and dtypes that the tests share: one section a stem."""
import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16)

# ---- reparam, rng: one vector, odd tails, several tiles of a row, zero sizes ----
SHAPES = ((1,), (3, 5), (2, 4, 8, 8), (5, 1031), (2, 9001), (0, 7), (4, 0))

# ---- interpolate: one element, odd tails, a vector in a tile and in several ----
PATHS = ((3, 2), (5, 37), (2, 3, 8, 8), (4, 513), (2, 4100))

# ---- denoise: latents, images, odd tails, several tiles of a row, zero sizes ----
LATENTS = ((1,), (7,), (2, 4, 8, 8), (3, 3, 5, 7), (9, 2, 41, 53), (2, 5003), (0, 4, 8, 8), (3, 0))

# ---- volrend: rays, samples, channels; one vector, tails, many vectors, every way to sum channels, zero sizes ----
RAYS = (
    (4, 16, 3), (5, 1, 3), (24, 77, 1), (24, 77, 2), (24, 40, 4), (24, 40, 7), (24, 33, 70), (70, 150, 3),
    (0, 7, 3), (3, 0, 2),
)

# ---- attention: (batch, queries, keys, heads, kv_heads, head_dim, value_dim) ----
# one query and chunks of keys, odd heads and dims, more queries than keys, several tiles, no keys, no queries, no rows
ATTENTION = (
    (2, 1, 300, 8, 2, 64, 64), (1, 1, 5001, 4, 4, 32, 32), (4, 3, 700, 4, 1, 128, 128), (3, 7, 129, 6, 2, 40, 72),
    (1, 130, 130, 3, 3, 64, 64), (1, 101, 333, 2, 1, 256, 256), (2, 9, 3, 4, 2, 7, 9), (1, 64, 65, 1, 1, 1, 1),
    (2, 3, 0, 4, 2, 16, 16), (2, 0, 5, 2, 2, 8, 8), (0, 3, 5, 2, 2, 8, 8),
)
# (queries, keys) of each row: one query and chunks of keys, tall rows, no keys, no queries, more queries than keys
RAGGED = (
    ((1, 300), (1, 3), (1, 70)), ((130, 130), (3, 0), (0, 5), (7, 40)), ((40, 9), (1, 1)), ((2, 2),), ((0, 0), (0, 3)),
    (),
)
# ---- merge_attention: (parts, ..., queries, heads, value_dim) ----
# one part, many, more than are held at a time, no leading dims and two, odd dims, more channels than are summed at a
# time on the CPU and on a GPU, zero sizes
MERGES = (
    (1, 2, 3, 4, 64), (33, 1, 4, 16, 128), (300, 2, 3, 24), (4, 5, 2, 7), (3, 2, 2, 9, 3, 40), (2, 3, 70, 2, 300),
    (2, 2, 8, 1100), (2, 0, 3, 2, 8), (2, 2, 0, 2, 8), (2, 2, 3, 2, 0),
)
