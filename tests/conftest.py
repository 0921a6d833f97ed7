"""Fixtures of several modules."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch

from onepass import _native, _ops

from helpers import device_of


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Suites that run in processes of their own come first, or one worker would be left with them at the end."""
    items.sort(key=lambda item: item.path.name != "test_suites.py")


@pytest.fixture
def on_its_device(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fresh tensors of a test lie where its backend computes."""
    callspec = getattr(request.node, "callspec", None)
    device = device_of(callspec.params.get("backend") if callspec else None)
    with contextlib.nullcontext() if device == "cpu" else torch.device(device):
        yield


@pytest.fixture
def nothing_kept() -> Iterator[None]:
    """No call is like an earlier one."""
    _ops.forget()
    yield
    _native._C.read_by_attributes(False)
    _ops.forget()
