"""What nvcc makes of the CUDA kernels, for the kernel report: rows from the objects that `make build` left behind.

    compiled.py FILE        with Triton importable, whose cuobjdump reads them
"""
from __future__ import annotations

import json
import pathlib
import re
import subprocess
import sys
import tempfile
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[3]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "tests"))

from gpuless import cubin  # noqa: E402

TARGETS = ("sm_80", "sm_90a", "sm_100a", "sm_120")
STEMS = ("attention", "attention_merge", "denoise", "gumbel", "interpolate", "latent", "reparam", "rng", "volrend")
TYPES = {"float": "fp32", "__nv_bfloat16": "bf16", "__half": "fp16"}
BLOCK, SHORT_BLOCK = 256, 128           # csrc/cuda/device.cuh
WHOLE_BLOCKS = ("add_partials", "add_background", "sum_tiles", "path_parts", "path_tiles", "sum_vectors")
WIDE_BLOCK = 512                       # csrc/cuda/gumbel.cuh
MOST_SHARED = 99 * 1024                 # csrc/cuda/attention.cu


def objects() -> dict[str, pathlib.Path]:
    """The object of each stem in the newest build."""
    found = {}
    for stem in STEMS:
        built = sorted(ROOT.glob(f"build/cmake-*/CMakeFiles/cuda_part.dir/csrc/cuda/{stem}.cu.o"),
                       key=lambda path: path.stat().st_mtime)
        if not built:
            raise FileNotFoundError(f"csrc/cuda/{stem}.cu is not built: `make build` with nvcc and all architectures")
        found[stem] = built[-1]
    return found


def nvcc_version() -> str:
    text = subprocess.run(["nvcc", "--version"], check=True, capture_output=True, text=True).stdout
    return "nvcc " + re.findall(r"release (\S+),", text)[0]


def rows() -> list[dict[str, Any]]:
    compiler = nvcc_version()
    found = []
    for stem, path in objects().items():
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([cubin.tool("cuobjdump"), "-xelf", "all", str(path)], cwd=folder, check=True,
                           capture_output=True)
            cubins = {re.findall(r"\.(sm_\w+)\.cubin$", p.name)[0]: p for p in pathlib.Path(folder).glob("*.cubin")}
            if missing := set(TARGETS) - set(cubins):
                raise FileNotFoundError(f"{path.name} holds no code for {', '.join(sorted(missing))}")
            for target in TARGETS:
                for mangled, kernel in cubin.read(cubins[target]).items():
                    name, configuration, parameters = _named(mangled)
                    threads = _threads(name, parameters)
                    dynamic = SHARED[name](parameters) if name in SHARED else 0
                    occupancy = cubin.occupancy(target, kernel.registers, kernel.shared + dynamic, threads)
                    found.append({
                        "stem": stem, "kernel": name, "configuration": configuration, "target": target,
                        "compiler": compiler, "threads": threads, **kernel.record(), "dynamic_shared": dynamic,
                        "occupancy": round(occupancy, 4),
                    })
    return found


def _named(mangled: str) -> tuple[str, str, list[str]]:
    """("fill", "fp32, 256", ["float", "256"]) of onepass::cuda::fill<float, 256>(...)."""
    text = subprocess.run(["c++filt", mangled], check=True, capture_output=True, text=True).stdout
    name, arguments = re.findall(r"onepass::cuda::(\w+)(?:<([^>]*)>)?\(", text)[0]
    parameters = [part.strip() for part in arguments.split(",") if part.strip()]
    return name, ", ".join(TYPES.get(part, part) for part in parameters), parameters


def _threads(name: str, parameters: list[str]) -> int:
    """Of a block: see launch_tiles for the kernels whose last parameter is the size of a group of threads."""
    if name in WHOLE_BLOCKS or parameters[-1:] == [str(BLOCK)]:
        return BLOCK
    if name == "gumbel_again" or parameters[-1:] == [str(WIDE_BLOCK)]:
        return WIDE_BLOCK
    return SHORT_BLOCK


def _attend_shared(parameters: list[str]) -> int:
    """Dynamic shared memory of attend where keys have as many channels as the values that its blocks hold."""
    size = 4 if parameters[0] == "float" else 2
    width = 32 * int(parameters[1])
    queries = 4 * 16 * width
    stage = size * 32 * (width + 16 // size + width)
    return queries + (2 if queries + 2 * stage <= MOST_SHARED else 1) * stage


def _tiles_shared(parameters: list[str]) -> int:
    """Dynamic shared memory of attend_tiles: TILE_SHARED of csrc/cuda/attention_tiles.cuh."""
    channels = int(parameters[1])
    return 2 * (channels + 8) * (64 + 4 * (16 if channels > 128 else 64))


def _gumbel_shared(parameters: list[str]) -> int:
    """Dynamic shared memory of gumbel_kept with the longest rows of its kind that a forward pass keeps."""
    rows, longest = {"32": (4, 512), "256": (1, 4095), "512": (1, 24573)}[parameters[1]]
    return 4 * rows * -(-(longest + 3) // 4) * 4


SHARED = {"attend": _attend_shared, "attend_tiles": _tiles_shared, "gumbel_kept": _gumbel_shared}

if __name__ == "__main__":
    lines = ",\n".join(map(json.dumps, rows()))
    pathlib.Path(sys.argv[1]).write_text(f"[\n{lines}\n]\n")
