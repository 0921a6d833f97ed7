"""What the tests of every op share."""
from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from onepass import _native

ISAS: tuple[str, ...] = () if _native.error else tuple(_native._C.usable_isas)
needs_native = pytest.mark.skipif(not ISAS, reason="no native extension")
CPU = pytest.param("cpu", marks=needs_native)
BACKENDS = ["reference", CPU]

# ONEPASS_EMULATED=ascending, descending or shuffled: the tests of every op take CUDA's kernels too, in the block
# emulator with its threads in that order (`pytest -k cuda`).
if EMULATED := os.environ.get("ONEPASS_EMULATED"):
    from gpuless.cuda import emulated

    _device = emulated.device(EMULATED)
    _device.__enter__()
    BACKENDS.append("cuda")

# Triton's kernels run on a GPU (`make gpu-check`), or in the interpreter on host memory (`make gpuless`).
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    from gpuless.triton import interpreter

    interpreter.install()

# For tests that put their tensors where device_of says.
_on_a_gpu = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"))
_needs_cuda = pytest.mark.skipif(_native.cuda_error is not None, reason=str(_native.cuda_error))
TRITON = pytest.param("triton", marks=() if INTERPRETED else _on_a_gpu)
CUDA = [] if EMULATED else [pytest.param("cuda", marks=(*_on_a_gpu, _needs_cuda))]      # emulated: in BACKENDS
ALL_BACKENDS = [*BACKENDS, *CUDA, TRITON]
KERNELS = ALL_BACKENDS[1:]              # all but the reference


def device_of(backend: str | None) -> str:
    return "cuda" if (backend == "cuda" and not EMULATED) or (backend == "triton" and not INTERPRETED) else "cpu"


def assert_as_good_as_torch(got: Tensor, same_dtype: Tensor, truth: Tensor, name: str = "result") -> None:
    """|got - truth| <= 2 |same_dtype - truth| + one ulp of the largest |truth|, by the largest element.

    `truth` is the float64 reference, `same_dtype` plain PyTorch in the dtype of `got`.
    """
    assert got.shape == truth.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(truth.shape)}"
    finite = truth.isfinite()
    assert torch.equal(got.isfinite(), finite), f"{name}: finite in other places than the truth"
    if not finite.any():
        return
    eps = torch.finfo(got.dtype).eps
    got, same_dtype, truth = (x.double()[finite] for x in (got, same_dtype, truth))
    error, torch_error = (got - truth).abs().max(), (same_dtype - truth).abs().max()
    allowed = 2 * torch_error + truth.abs().max() * eps
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def run_python(code: str, **environment: str) -> str:
    """Standard output of `code` in a fresh interpreter with these variables set; its output on failure."""
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
