"""Implementations of others that several stems compare with; each is there only where it is installed and can run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

SDPA = {
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def sdpa_backends(device: torch.device, attend: Callable[..., Tensor]) -> dict[str, Callable[..., Any]]:
    """`attend` (a function that calls scaled_dot_product_attention) held to each of PyTorch's fused kernels in turn.

    On a CPU PyTorch has one, which it picks itself. A kernel that refuses the call becomes a row with the reason.
    """

    def held(backend: SDPBackend) -> Callable[..., Any]:
        def run(*arguments: Any) -> Tensor:
            with sdpa_kernel(backend):
                return attend(*arguments)

        return run

    return {name: held(backend) for name, backend in SDPA.items()} if device.type == "cuda" else {}
