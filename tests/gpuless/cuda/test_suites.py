"""CUDA's kernels under the tests that every backend takes, and under the sanitizers."""
from __future__ import annotations

import os
import subprocess
import sys

import pytest

from gpuless.cuda import emulated

pytestmark = [
    pytest.mark.skipif(emulated.why_not() is not None, reason=str(emulated.why_not())),
    pytest.mark.skipif(emulated.VARIANT != "plain" or "ONEPASS_EMULATED" in os.environ, reason="runs in itself"),
]
PYTEST = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--capture=sys"]       # sanitizers write to file 2
SUITES = ("test_attention_merge.py", "test_denoise.py", "test_denoise_api.py", "test_gumbel.py", "test_interpolate.py",
          "test_latent.py", "test_reparam.py", "test_volrend.py")
CASES = ("test_cuda_denoise.py", "test_cuda_gumbel.py", "test_cuda_interpolate.py", "test_cuda_latent.py",
         "test_cuda_reparam.py", "test_cuda_volrend.py", "test_cuda_attention.py", "test_cuda_attention_merge.py")


@pytest.mark.parametrize("order", [
    "shuffled", *(pytest.param(order, marks=pytest.mark.slow) for order in ("ascending", "descending")),
])
def test_the_suites_of_every_backend(order):
    emulated.build("emulated_kernels")
    files = [str(emulated.ROOT / "tests" / name) for name in SUITES]
    done = subprocess.run([sys.executable, *PYTEST, "-m", "not gpu and not slow", "-k", "cuda", *files],
                          env={**os.environ, "ONEPASS_EMULATED": order}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("variant", ["address", "thread"])
def test_no_access_is_out_of_bounds_or_unordered(variant):
    """AddressSanitizer and ThreadSanitizer stop at the first fault; one order shows them as well as three."""
    emulated.build("emulated_kernels", variant)
    files = [str(emulated.HERE / name) for name in CASES]
    done = emulated.sanitized(variant, [*PYTEST, "-m", "not gpu and not slow", "-k", "ascending", *files])
    assert done.returncode == 0, done.stdout + done.stderr
