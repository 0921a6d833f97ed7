"""The stand-in driver compiles real launches for every architecture, and reports what a GPU would refuse."""
from __future__ import annotations

import re
import struct

import numpy as np
import pytest
import torch

from onepass.reference import rng

from gpuless.triton import interpreter

triton = pytest.importorskip("triton", reason="`make gpuless` brings Triton")
if interpreter.ON:
    pytest.skip("interpreting: `make gpuless` compiles in another process", allow_module_level=True)

import triton.language as tl  # noqa: E402
from triton.runtime.errors import OutOfResources  # noqa: E402

from gpuless.triton import benchmarks, driver, launches  # noqa: E402

NVIDIA = [target for target in driver.TARGETS if target.startswith("sm_")]


@triton.jit
def double(X, Y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(Y + at, tl.load(X + at, mask=at < n) * 2, mask=at < n)


@triton.jit
def matmul(A, B, C, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    total = tl.zeros([M, N], tl.float32)
    for i in range(16):
        a = tl.load(A + m[:, None] * K * 16 + i * K + k[None, :])
        b = tl.load(B + (i * K + k)[:, None] * N + n[None, :])
        total = tl.dot(a, b, total)
    tl.store(C + m[:, None] * N + n[None, :], total)


@triton.jit
def not_a_power_of_two(X, Y):
    at = tl.arange(0, 48)
    tl.store(Y + at, tl.load(X + at))


@triton.jit
def changes_its_type(X, Y, n):
    total = 0
    for i in range(n):
        total += tl.load(X + i)
    tl.store(Y, total)


@pytest.mark.parametrize("target", driver.TARGETS)
def test_a_launch_is_compiled_and_recorded(target):
    x = torch.empty(1000, device="meta")
    with driver.on(target) as done:
        double[lambda names: (triton.cdiv(1000, names["BLOCK"]),)](x, x, 1000, BLOCK=256, num_warps=2)
    launch, = done
    assert (launch.kernel, launch.grid, launch.warps) == ("double", (4, 1, 1), 2)
    assert launch.configuration == "fp32 BLOCK=256 warps=2"
    found = driver.record(launch)
    assert found["spill_bytes"] == 0 and 0 < found["registers"] < 64 and 0 < found["occupancy"] <= 1
    assert found["load"] >= 1 and found["store"] >= 1 and found["arch"].startswith(target)


def test_loops_are_walked_as_often_as_the_arguments_say():
    from onepass.kernels import attention

    x = torch.empty(2, 1024, 8, 64, device="meta")
    with driver.on("sm_90") as done:
        for causal in (True, False):
            attention.forward(x, x, x, causal, -1, -1, 0.0, 0.1)
        attention.forward(x[:, :1], x, x, False, -1, -1, 0.0, 0.1)      # four splits of 256 keys
        launches.volrend()
    walked = [(launch.kernel, benchmarks.passes(launch)) for launch in done]
    assert walked[:4] == [("attend", (32 + 1) / 2), ("attend", 32), ("attend", 256 // 32), ("combine", 4)]
    assert all(times == 1 for _, times in walked[4:])


@pytest.mark.parametrize("target", driver.TARGETS)
def test_matrix_instructions_are_found(target):
    a, b, c = (torch.empty(s, dtype=torch.bfloat16, device="meta") for s in ((64, 512), (512, 64), (64, 64)))
    with driver.on(target) as done:
        matmul[(1,)](a, b, c.float(), M=64, N=64, K=32, num_warps=4)
    assert driver.record(done[0])["matrix"] > 0


def test_what_does_not_fit_is_refused():
    a, b = (torch.empty(1 << 20, dtype=torch.bfloat16, device="meta") for _ in range(2))
    c = torch.empty(1 << 20, device="meta")
    with driver.on("sm_90"), pytest.raises(OutOfResources, match="shared memory"):
        matmul[(1,)](a, b, c, M=128, N=128, K=256, num_warps=8, num_stages=4)


def test_spills_are_counted():
    a, b = (torch.empty(1 << 20, dtype=torch.bfloat16, device="meta") for _ in range(2))
    c = torch.empty(1 << 20, device="meta")
    with driver.on("sm_80") as done:
        matmul[(1,)](a, b, c, M=128, N=256, K=32, num_warps=4)
    assert driver.record(done[0])["spill_bytes"] > 0


def test_a_grid_that_no_gpu_takes_is_refused():
    x = torch.empty(8, device="meta")
    for grid in ((0,), (1, 1 << 16), (1 << 31,)):
        with driver.on("sm_90"), pytest.raises(ValueError, match="no GPU takes it"):
            double[grid](x, x, 8, BLOCK=8)


def test_what_only_the_compiler_refuses_is_refused():
    x = torch.empty(64, device="meta")
    with driver.on("sm_90"), pytest.raises(triton.CompilationError, match="power of 2"):
        not_a_power_of_two[(1,)](x, x)
    with driver.on("sm_90"), pytest.raises(triton.CompilationError, match="total"):
        changes_its_type[(1,)](x, x, 64)


FUSES_PACKED = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)       # refused by _supports_triton.py


@pytest.mark.parametrize("target", NVIDIA)
def test_random_numbers_are_compiled_without_a_fused_multiply_add(target):
    """In the listing of each distribution, but for two kinds that change no bit: the expansion of the correctly rounded
    square root, and a product by a power of two, which is exact."""
    with driver.on(target) as done:
        launches.rng()
    wrong = []
    for launch in done:
        assert "fma" not in launch.compiled.asm["ptx"], launch.configuration
        listing = driver.cubin.sass(launch.compiled.asm["cubin"])
        fused = re.findall(r"FFMA\S* ([^;&?]*)", listing)
        kept = [operands for operands in fused if "1.1641532182693481445e-10" not in operands]
        roots = listing.count("MUFU.RSQ")
        normal = launch.constants["DISTRIBUTION"] == 1
        if (roots > 1) != normal or len(kept) > (2 * (roots - 1) + 3) * normal:
            wrong.append((launch.configuration, kept))  # two for each root in line, three for the one out of line
    if FUSES_PACKED and target in ("sm_100", "sm_120"):
        assert wrong, "the old assembler does it right: the refusal may go"
    else:
        assert not wrong


POLYNOMIALS = {*rng._LN, *rng._SIN, *rng._COS, rng._HALF_PI_LOW}


@pytest.mark.parametrize("stem", ["reparam", "latent", "gumbel"])
@pytest.mark.parametrize("target", [t for t in NVIDIA if not FUSES_PACKED or t not in ("sm_100", "sm_120")])
def test_ops_that_draw_fuse_nothing_of_the_recipe(target, stem):
    """They fuse products and sums of their own, and none that holds a coefficient of the recipe's polynomials."""
    with driver.on(target) as done:
        launches.STEMS[stem]()
    words = {f"0f{struct.pack('>f', x).hex().upper()}" for x in POLYNOMIALS}
    numbers = {np.float32(x) for x in POLYNOMIALS}
    drawing = 0
    for launch in done:
        ptx, listing = launch.compiled.asm["ptx"], driver.cubin.sass(launch.compiled.asm["cubin"])
        drawing += any(word in ptx for word in words)
        assert not [line for line in re.findall(r"fma\.\S* [^;]*", ptx) if any(word in line for word in words)]
        fused = re.findall(r"FFMA\S* ([^;&?]*)", listing)
        literals = {np.float32(x) for line in fused for x in re.findall(r"-?\d+\.\d+(?:e[-+]\d+)?", line)}
        assert not literals & numbers, launch.configuration
    assert drawing >= 4
