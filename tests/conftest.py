"""Fixtures of several modules."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch

from helpers import device_of


@pytest.fixture
def on_its_device(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fresh tensors of a test lie where its backend computes."""
    callspec = getattr(request.node, "callspec", None)
    device = device_of(callspec.params.get("backend") if callspec else None)
    with contextlib.nullcontext() if device == "cpu" else torch.device(device):
        yield
