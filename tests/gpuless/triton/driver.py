"""A Triton driver without a GPU: real host wrappers run on `meta` tensors, kernels compile for any architecture.

Inside `on(target)` a launch specialises and compiles as on that GPU, is checked against its limits (Triton raises
OutOfResources where shared memory, tensor memory or threads do not fit) and is recorded instead of run.
"""
from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.jit import JITFunction

from gpuless import cubin

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_GFX942_SHARED, _GFX942_REGISTERS, _GFX942_WAVES = 64 << 10, 512, 8      # a compute unit; a SIMD's lane; a SIMD


@dataclass(frozen=True)
class Launch:
    kernel: str                     # the name of the jitted function
    target: str
    types: dict[str, str]           # of the arguments that are not constexpr: "*bf16", "i32", ...
    constants: dict[str, Any]       # constexpr arguments, and 1 or None where Triton specialised on them
    arguments: dict[str, Any]       # by name, as they came
    grid: tuple[int, int, int]
    warps: int
    compiled: Any                   # Triton's CompiledKernel

    @property
    def configuration(self) -> str:
        """What this launch was compiled for, in one line: element types, constants, warps."""
        types = sorted({t[1:] for t in self.types.values() if t.startswith("*")})
        absent = [f"no {k}" for k, v in self.constants.items() if v is None]
        constants = [f"{k}={v}" for k, v in self.constants.items() if k.isupper() and v is not None]
        return " ".join(["/".join(types), *constants, *absent, f"warps={self.warps}"])


class _Utilities:
    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_device_properties(self, device: int) -> dict[str, int]:
        cuda = self.target.backend == "cuda"
        shared = cubin.MULTIPROCESSORS[self.target.arch].block_shared if cuda else _GFX942_SHARED
        return {
            "max_shared_mem": shared, "max_num_regs": 65536, "multiprocessor_count": 132, "warpSize": 32,
            "sm_clock_rate": 1, "mem_clock_rate": 1, "mem_bus_width": 1,
        }

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        return 1, 1, 0, 0, 1024                              # module, function, registers, spills, threads

    def unload_module(self, *args: Any) -> None:
        pass


class _Launcher:
    def __init__(self, source: Any, metadata: Any) -> None:
        pass

    def __call__(self, *args: Any) -> None:
        pass


class StandIn(DriverBase):
    """What Triton asks of a driver, for one target."""

    launcher_cls = _Launcher

    def __init__(self, number: int, target: GPUTarget) -> None:
        self.number, self.target, self.utils = number, target, _Utilities(target)

    @classmethod
    def is_active(cls) -> bool:
        return False

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:                     # a number for each target: compiled kernels are kept by it
        return self.number

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    def get_device_interface(self) -> Any:
        return torch.cuda

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind

    def get_benchmarker(self) -> Any:
        raise RuntimeError("nothing is timed without a GPU: a kernel must choose its configuration without autotuning")


@contextlib.contextmanager
def on(target: str) -> Iterator[list[Launch]]:
    """Launches inside the block compile for `target` and are collected in the list that it gives."""
    launches: list[Launch] = []
    plain = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        names = {**dict(zip(self.arg_names, args, strict=False)), **kwargs}
        size = tuple(grid(names) if callable(grid) else grid)
        size = size + (1,) * (3 - len(size))
        if min(size) <= 0 or size[0] >= 2**31 or max(size[1:]) >= 2**16:
            raise ValueError(f"{self.__name__} is launched on a grid of {size}: no GPU takes it")
        compiled = plain(self, *args, grid=size, warmup=warmup, **kwargs)
        source = compiled.src
        constants = {self.arg_names[path[0]]: value for path, value in source.constants.items()}
        types = {k: v for k, v in source.signature.items() if v != "constexpr"}
        constants = {k: getattr(v, "value", v) for k, v in constants.items()}
        launches.append(
            Launch(self.__name__, target, types, constants, names, size, compiled.metadata.num_warps, compiled)
        )
        return compiled

    driver = triton.runtime.driver
    before = driver._active
    driver.set_active(StandIn(list(TARGETS).index(target), TARGETS[target]))
    JITFunction.run = run
    try:
        yield launches
    finally:
        JITFunction.run = plain
        driver._active = before


def record(launch: Launch) -> dict[str, Any]:
    """What the report keeps of a compiled launch."""
    metadata = launch.compiled.metadata
    threads = launch.warps * TARGETS[launch.target].warp_size
    common = {"threads": threads, "dynamic_shared": metadata.shared}
    if launch.target.startswith("gfx"):
        return {**_amd_record(launch.compiled.asm["amdgcn"], metadata.shared, launch.warps), **common}
    kernel = cubin.read(launch.compiled.asm["cubin"])[launch.compiled.metadata.name]
    occupancy = cubin.occupancy(launch.target, kernel.registers, metadata.shared + kernel.shared, threads)
    return {**kernel.record(), **common, "occupancy": round(occupancy, 3)}


def _amd_record(text: str, shared: int, waves: int) -> dict[str, Any]:
    """The same of AMD's assembly; AMD, "CDNA 3 instruction set architecture", section 3, for the registers."""
    field = lambda name: int((re.search(rf"\.{name}:\s+(\d+)", text) or [0, 0])[1])
    count = lambda pattern: len(re.findall(rf"^\s+{pattern}", text, re.MULTILINE))
    registers = max(field("vgpr_count"), 1)
    by_registers = _GFX942_REGISTERS // (-(-registers // 8) * 8) * 4 // waves
    by_shared = _GFX942_SHARED // shared if shared else by_registers
    resident = min(by_registers, by_shared, 4 * _GFX942_WAVES // waves) * waves
    kinds = {
        "matrix": r"v_mfma", "load": r"(?:global|buffer|flat)_load", "store": r"(?:global|buffer|flat)_store",
        "wide_load": r"(?:global|buffer|flat)_load_dwordx4", "wide_store": r"(?:global|buffer|flat)_store_dwordx4",
        "shared_load": r"ds_read", "shared_store": r"ds_write", "barrier": r"s_barrier",
        "special": r"v_(?:exp|log|rcp|rsq|sqrt|sin|cos)_", "fma": r"v_(?:pk_)?(?:fma|fmac|fmaak|fmamk|mad|mac)_",
        "atomic": r"(?:global|buffer|flat|ds)_(?:atomic|add)",
    }
    counts = {kind: count(pattern) for kind, pattern in kinds.items()}
    return {
        "arch": "gfx942", "registers": registers, "stack": field("private_segment_fixed_size"),
        "spill_bytes": 4 * field("vgpr_spill_count"), "instructions": count(r"[vs]_|global_|buffer_|flat_|ds_"),
        **{k: v for k, v in counts.items() if v}, "occupancy": round(resident / (4 * _GFX942_WAVES), 3),
    }
