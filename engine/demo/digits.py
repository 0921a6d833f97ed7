"""scikit-learn's handwritten digits: 1797 images of 8 x 8 in 17 greys, which its wheel carries."""
from __future__ import annotations

import torch
from torch import Tensor


def load() -> tuple[Tensor, Tensor]:
    """(images [1797, 1, 8, 8] float32 in [-1, 1], labels [1797] int64)."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(data.images).float().unsqueeze(1) / 8 - 1
    return images, torch.from_numpy(data.target).long()
