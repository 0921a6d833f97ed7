"""What the benchmarks launch on a GPU, and how many instructions that issues: docs/performance.md predicts from it.

    benchmarks.py write     with Triton importable: every case of `onepass bench` to ../benchmarks.json
    benchmarks.py check     fails where it differs

Each case runs once on host tensors with the stand-in driver, so grids and configurations are the wrappers' own. A warp
issues every instruction outside the kernel's longest loop once and those inside once a pass: an upper bound where code
branches, which these kernels hardly do.
"""
from __future__ import annotations

import json
import pathlib
import sys
from typing import Any
from unittest import mock

import torch

if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from gpuless import cubin
from gpuless.triton import driver

RECORD = pathlib.Path(__file__).resolve().parents[1] / "benchmarks.json"
TARGET = "sm_90"
STEMS = ("attention", "denoise", "gumbel", "interpolate", "reparam", "rng", "volrend")


def passes(launch: driver.Launch) -> float:
    """How often a program walks its longest loop, on average over the programs."""
    value = launch.arguments
    if launch.kernel.startswith("composite_rays"):
        longest = max(value["n_samples"], 1)
        return -(-longest // value["B"])
    if launch.kernel == "attend":
        keys = value["keys"] if value["Lengths"] is None else int(value["Lengths"].max())
        each = -(-keys // launch.grid[2])
        blocks = -(-each // value["BN"])
        square = value["CAUSAL"] and value["queries"] == keys
        return (blocks + 1) / 2 if square else blocks
    if launch.kernel in ("sample_tiles", "sample_backward_tiles"):
        return value["count"]
    if launch.kernel == "combine":
        return value["Parts"].shape[0]
    if launch.kernel in ("merge_parts", "merge_parts_backward"):
        return -(-value["parts"] // value["AHEAD"])
    return 1


def launches_of(stem: str) -> list[dict[str, Any]]:
    """A row for each case of a stem: its launches, each with the instructions that a warp of it issues."""
    from onepass import _supports_triton, use_backend
    from onepass.benches import cli, harness

    rows = []
    for case in cli.cases(stem, torch.device("cpu")):
        arguments = harness.inputs(case, torch.device("cpu"))
        with mock.patch.object(_supports_triton, "interpreted", return_value=True), driver.on(TARGET) as done:
            try:
                with use_backend("triton"):
                    case.implementations["onepass"](*arguments)
            except ValueError as error:             # no Triton kernel takes the case
                rows.append({"stem": stem, "case": case.name, "launches": [], "why": str(error)})
                continue
        rows.append({"stem": stem, "case": case.name, "launches": [_issued(launch) for launch in done]})
    return rows


def _issued(launch: driver.Launch) -> dict[str, Any]:
    binary = launch.compiled.asm["cubin"]
    once = cubin.read(binary)[launch.compiled.metadata.name].instructions
    issued = once + (passes(launch) - 1) * cubin.longest_loop(cubin.sass(binary))
    programs = launch.grid[0] * launch.grid[1] * launch.grid[2]
    return {"kernel": launch.kernel, "programs": programs, "warps": launch.warps, "instructions": round(issued)}


def main(command: str) -> int:
    rows = [row for stem in STEMS for row in launches_of(stem)]
    text = "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n"
    if command == "write":
        RECORD.write_text(text)
    else:
        kept = json.loads(RECORD.read_text()) if RECORD.exists() else []
        differing = {f"{row['stem']} {row['case']}" for row in rows + kept if row not in rows or row not in kept}
        if differing:
            print(f"tests/gpuless/{RECORD.name} is old: `make kernel-report` accepts what the benchmarks launch now")
            print("\n".join(f"  {case}" for case in sorted(differing)))
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
