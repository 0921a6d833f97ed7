"""The shipped weights: fp16 in safetensors, with what else a model needs as JSON in the file's metadata."""
from __future__ import annotations

import json
import os
import pathlib
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

FOLDER = pathlib.Path(__file__).parent / "weights"


def save(model: nn.Module, name: str, folder: pathlib.Path, **extra: Any) -> pathlib.Path:
    """Write `folder`/`name`.safetensors whole or not at all, and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path, partial = folder / f"{name}.safetensors", folder / f".{name}.partial"
    state = {key: value.detach().to(torch.float16).contiguous() for key, value in model.state_dict().items()}
    metadata = {key: json.dumps(value, separators=(",", ":")) for key, value in extra.items()}
    try:
        save_file(state, partial, metadata=metadata)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def load(name: str, folder: pathlib.Path = FOLDER) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(state dict in fp32, metadata) of `name`."""
    with safe_open(folder / f"{name}.safetensors", framework="pt") as file:
        state = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118 (not a dict)
        metadata = {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
    return state, metadata
