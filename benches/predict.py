"""What a case should take on a GPU, before anybody has run it there: bytes, FLOPs and issue slots.

The instructions are those of the Triton kernels, counted in what they compile to (tests/gpuless/benchmarks.json, made
by tests/gpuless/triton/benchmarks.py): their code is a straight line with one loop, where nvcc's holds the paths of all
options. CUDA's kernels move the same bytes.
"""

from __future__ import annotations

import functools
import json
import pathlib
from dataclasses import dataclass
from typing import Any

from .harness import Case
from .machine import Rates

LAUNCHES = pathlib.Path(__file__).resolve().parents[1] / "tests" / "gpuless" / "benchmarks.json"


@dataclass(frozen=True)
class Gpu:
    """Inputs of the model. `rates` are assumed to be reached, a little under those of the data sheet."""

    name: str
    rates: Rates
    multiprocessors: int
    clock: float  # Hz
    slots: int = 4  # instructions of as many warps that a multiprocessor issues in a cycle


H200 = Gpu(
    "NVIDIA H200",
    Rates(read=4.3e12, copy=4.3e12, matmul={"float32": 67e12, "bfloat16": 790e12, "float16": 790e12}),
    multiprocessors=132,
    clock=1.98e9,
)
_TERA = {name: f"{value / 1e12:g}" for name, value in H200.rates.matmul.items()}
TEXT = f"""**GPU rows are predicted for an {H200.name}.** Inputs, assumed: copy
{H200.rates.copy / 1e12:g} TB/s (data sheet 4.8), matrices of bf16 and fp16 {_TERA["bfloat16"]} TFLOP/s (data sheet
989) and of float32 {_TERA["float32"]} TFLOP/s, {H200.multiprocessors}
multiprocessors at {H200.clock / 1e9:g} GHz that issue {H200.slots} warp instructions a cycle.
Instructions are counted in the compiled Triton kernels, loops by their passes; the multiprocessor with the most
programs counts. Latency, launch and host time are left out: what is predicted under some 5 us takes longer.
"""


@functools.cache
def _launches() -> dict[tuple[str, str], list[dict[str, Any]]]:
    rows = json.loads(LAUNCHES.read_text()) if LAUNCHES.exists() else []
    return {(row["stem"], row["case"]): row["launches"] for row in rows}


def issue(launches: list[dict[str, Any]], gpu: Gpu = H200) -> float:
    """Seconds in which the busiest multiprocessor issues its share of each launch, one launch after another."""
    cycles = 0.0
    for launch in launches:
        programs = -(-launch["programs"] // gpu.multiprocessors)
        cycles += programs * launch["warps"] * launch["instructions"] / gpu.slots
    return cycles / gpu.clock


def on_gpu(stem: str, case: Case, gpu: Gpu = H200) -> tuple[str, float]:
    """What binds ("memory", "matmul" or "issue") and the seconds that it takes."""
    bound = gpu.rates.bound(case.reads, case.writes, case.flops, case.dtype)
    return max(bound, ("issue", issue(_launches().get((stem, case.name), []), gpu)), key=lambda pair: pair[1])
