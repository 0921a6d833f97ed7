"""What nvcc makes of the kernels, on a machine without a GPU."""
from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from gpuless.cuda import emulated

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")


def ptx(stem: str, folder) -> str:
    target = folder / f"{stem}.ptx"
    csrc = emulated.ROOT / "csrc"
    command = ["nvcc", "-std=c++17", "-arch=compute_80", "-ptx", f"-I{csrc / 'include'}", "-o", target,
               csrc / "cuda" / f"{stem}.cu"]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return target.read_text()


@needs_nvcc
def test_random_numbers_use_no_fused_multiply_add(tmp_path):
    """Each operation says how it rounds: ptxas fuses only a mul and an add without .rn."""
    code = ptx("rng", tmp_path)
    operations = re.findall(r"^\s+(?:@%p\d+ )?((?:mul|add|sub|fma|mad|sqrt|div|rcp)\.[a-z.]*f32)\b", code, re.M)
    assert set(operations) == {"mul.rn.f32", "add.rn.f32", "sub.rn.f32", "sqrt.rn.f32"}
    assert "ex2" not in code and "lg2" not in code and "sin.approx" not in code
