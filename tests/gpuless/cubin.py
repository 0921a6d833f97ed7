"""What a compiled CUDA kernel is made of: registers, local and shared memory, and its instructions by kind.

Works on any cubin, Triton's or nvcc's, with the `cuobjdump` and `nvdisasm` that every Triton wheel carries; no GPU is
needed. `occupancy` says how many warps of it a multiprocessor holds.
"""
from __future__ import annotations

import collections
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

# Kinds of instructions by the first part of the opcode, or the whole of it up to a modifier. The first match counts.
KINDS: dict[str, str] = {
    "matrix": r"[A-Z]MMA|[A-Z]GMMA|UTC\w*MMA|MMA",
    "async_load": r"LDGSTS|UTMALDG|UBLKCP|UTMAPF",
    "load": r"LDG|LD",
    "store": r"STG|ST|UTMASTG|UBLKRED|UTMAREDG",
    "shared_load": r"LDS|LDSM",
    "shared_store": r"STS|STSM",
    "tensor_memory": r"LDTM|STTM|UTCCP",
    "local_load": r"LDL",
    "local_store": r"STL",
    "barrier": r"BAR|SYNCS|WARPGROUP|WARPSYNC|MEMBAR|UCGABAR_\w+",
    "shuffle": r"SHFL|REDUX|CREDUX",
    "atomic": r"ATOM|ATOMG|ATOMS|RED|REDG|REDAS",
    "special": r"MUFU",
    "fma": r"FFMA2?|DFMA",          # HFMA2 is left out: it is how constants are moved
    "call": r"CALL",
}
_KINDS = {kind: re.compile(pattern) for kind, pattern in KINDS.items()}
_WIDE = re.compile(r"\.(128|256)\b")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*(?:\.[A-Za-z0-9_]+)*)")


@dataclass(frozen=True)
class Multiprocessor:
    """Limits of a multiprocessor; CUDA C++ Programming Guide, "Technical specifications per compute capability"."""

    warps: int
    blocks: int
    shared: int                     # bytes, of which each block loses 1024 to the system
    block_shared: int               # the most that one block may ask for
    registers: int = 65536


MULTIPROCESSORS = {
    80: Multiprocessor(64, 32, 164 << 10, 163 << 10),
    90: Multiprocessor(64, 32, 228 << 10, 227 << 10),
    100: Multiprocessor(64, 32, 228 << 10, 227 << 10),
    120: Multiprocessor(48, 24, 100 << 10, 99 << 10),
}


@dataclass(frozen=True)
class Kernel:
    """One kernel of a cubin. `spill_bytes` sums the widths of its local loads and stores, each counted once: spilled
    registers and local arrays alike, since both go through memory."""

    name: str
    arch: str                       # as "sm_90a"
    registers: int
    stack: int                      # bytes a thread
    shared: int                     # static bytes a block; dynamic shared memory is the launch's
    spill_bytes: int
    instructions: int
    counts: dict[str, int]          # of each kind of KINDS, and wide_load, wide_store: 16 bytes a thread and more
    opcodes: dict[str, int]         # with every modifier, as "LDG.E.128"

    def record(self) -> dict[str, Any]:
        """What a report keeps: everything but the opcodes, kinds that occur."""
        fields = {k: v for k, v in asdict(self).items() if k not in ("counts", "opcodes", "name")}
        return {**fields, **{k: v for k, v in self.counts.items() if v}}


def tool(name: str) -> str:
    """The path of cuobjdump or ptxas: of the Triton that would be imported, else of a CUDA toolkit."""
    spec = importlib.util.find_spec("triton")
    roots = spec.submodule_search_locations or [] if spec else []
    places = [pathlib.Path(root) / "backends/nvidia/bin" for root in roots]
    places += [pathlib.Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"]
    for place in places:
        if (place / name).is_file():
            return str(place / name)
    if found := shutil.which(name):
        return found
    raise FileNotFoundError(f"{name} is neither in an installed Triton, in CUDA_HOME nor on PATH")


def _run(name: str, *arguments: str) -> str:
    done = subprocess.run([tool(name), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} {' '.join(arguments)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def _number(arch: str | int) -> int:
    return int(re.sub(r"\D", "", str(arch)))


def _bytes_wide(opcode: str) -> int:
    for bits in (256, 128, 64, 16, 8):
        if re.search(rf"\.[US]?{bits}\b", opcode):
            return bits // 8
    return 4


def _functions(listing: str) -> Iterator[tuple[str, str, list[str]]]:
    """(architecture, name, opcodes) of each function in what `cuobjdump -sass` prints."""
    for part in re.split(r"^\s*code for ", listing, flags=re.MULTILINE)[1:]:
        arch = part.split(None, 1)[0]
        for body in re.split(r"^\s*Function : ", part, flags=re.MULTILINE)[1:]:
            yield arch, body.split(None, 1)[0], _INSTRUCTION.findall(body)


def _kernel(name: str, arch: str, usage: dict[str, int], opcodes: list[str]) -> Kernel:
    counts: collections.Counter[str] = collections.Counter(dict.fromkeys([*KINDS, "wide_load", "wide_store"], 0))
    spilled = 0
    for opcode in opcodes:
        head = opcode.split(".")[0]
        kind = next((k for k, pattern in _KINDS.items() if pattern.fullmatch(head)), None)
        if kind is None:
            continue
        counts[kind] += 1
        if kind.startswith("local"):
            spilled += _bytes_wide(opcode)
        if kind in ("load", "async_load", "store") and (_WIDE.search(opcode) or head.startswith("UTMA")):
            counts["wide_store" if kind == "store" else "wide_load"] += 1
    reserved = 1024 if _number(arch) >= 90 and usage["SHARED"] else 0       # the system's part, counted since Hopper
    return Kernel(
        name, arch, usage["REG"], usage["STACK"], usage["SHARED"] - reserved, spilled, len(opcodes), dict(counts),
        dict(collections.Counter(opcodes)),
    )


def sass(cubin: bytes) -> str:
    """What `cuobjdump -sass` prints."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return _run("cuobjdump", "-sass", file.name)


def longest_loop(listing: str) -> int:
    """Instructions of the longest loop in what `sass` gives, from where it begins to the branch back; 0 without one."""
    longest = 0
    for at, to in re.findall(r"/\*([0-9a-f]{4,})\*/[^;]*\bBRA[^;]*\b0x([0-9a-f]+)\s*;", listing):
        longest = max(longest, (int(at, 16) - int(to, 16)) // 16 + 1)
    return longest if longest > 1 else 0                # the last instruction of a kernel branches to itself


def read(cubin: bytes | os.PathLike[str] | str) -> dict[str, Kernel]:
    """The kernels of a cubin by (mangled) name; a device function that is not inlined counts as one of its own."""
    if isinstance(cubin, bytes):
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(cubin)
            file.flush()
            return read(file.name)
    text = _run("cuobjdump", "-res-usage", "-sass", os.fspath(cubin))
    usage = {
        name: {key: int(value) for key, value in re.findall(r"([A-Z]+):(\d+)", line)}
        for name, line in re.findall(r"Function (\S+):\s*\n\s*(REG:.*)", text)
    }
    none = {"REG": 0, "STACK": 0, "SHARED": 0}
    return {name: _kernel(name, arch, usage.get(name, none), opcodes) for arch, name, opcodes in _functions(text)}


def _round_up(value: int, to: int) -> int:
    return -(-value // to) * to


def occupancy(arch: str | int, registers: int, shared: int, threads: int) -> float:
    """Resident warps over the most there can be: `shared` bytes a block, static and dynamic, `threads` a block.

    A warp's registers are allocated 256 at a time from one of four parts, shared memory 128 bytes at a time and 1024
    more for the system.
    """
    limits = MULTIPROCESSORS[_number(arch)]
    warps = -(-threads // 32)
    if shared > limits.block_shared:
        return 0.0
    by_registers = limits.registers // _round_up(max(registers, 1) * 32, 256) // 4 * 4 // warps
    by_shared = limits.shared // (_round_up(shared, 128) + 1024)
    blocks = min(by_registers, by_shared, limits.blocks, limits.warps // warps)
    return blocks * warps / limits.warps
