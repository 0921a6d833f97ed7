"""The device that tests of CUDA kernels run on: the block emulator in each order of threads, or a GPU."""
from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from onepass import _native

from gpuless.cuda import emulated

_GPU = pytest.param("cuda", marks=pytest.mark.gpu)


@pytest.fixture(params=[*emulated.ORDERS, _GPU])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where tensors go: the emulator reads host memory."""
    if request.param == "cuda":
        why = None if torch.cuda.is_available() else "torch sees no GPU"
        if why := why or _native.cuda_error:
            pytest.skip(why)
        yield "cuda"
    elif why := emulated.why_not():
        pytest.skip(why)
    else:
        with emulated.device(request.param):
            yield "cpu"
