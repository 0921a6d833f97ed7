"""What this machine is and what it can do: names, versions, and the measured rates that rows are held against.

Copy and read bandwidth are the better of PyTorch's and our own loop over at least 256 MB (bytes read plus bytes
written); the matrix rate is torch.mm at 2048^3 on a CPU and 8192^3 on a GPU, in the dtype of the row.
"""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import itertools
import os
import pathlib
import platform
import subprocess
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy
import torch

import onepass
from onepass import _native

POOL_BYTES = 256 << 20
SHORTEST_WATCH = 0.5  # seconds: the system counts CPU time in hundredths
PACKAGES = ("torch", "numpy", "triton", "diffusers", "onnxruntime", "flash-attn", "flashinfer-python", "nerfacc")


@dataclass(frozen=True)
class Rates:
    """Ceilings, in bytes and FLOPs per second: the fastest pass of each loop."""

    read: float
    copy: float
    matmul: dict[str, float]  # by dtype, "bfloat16" for torch.bfloat16
    winners: dict[str, str] = field(default_factory=dict)  # whose loop gave read and copy

    def bound(self, reads: int, writes: int, flops: int, dtype: torch.dtype) -> tuple[str, float]:
        """Which rate binds and the seconds it allows; few writes (under a tenth) mean the read rate."""
        total = reads + writes
        memory = total / (self.read if writes < 0.1 * total else self.copy)
        arithmetic = flops / self.matmul.get(name_of(dtype), self.matmul["float32"])
        return ("matmul", arithmetic) if arithmetic > memory else ("memory", memory)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def last_level_cache() -> int:
    """Bytes of the largest CPU cache, 0 where the system does not say."""
    sizes = [0]
    for path in pathlib.Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text.rstrip("KMG")) << {"K": 10, "M": 20, "G": 30}.get(text[-1], 0))
    return max(sizes)


def pool_bytes(device: torch.device) -> int:
    """How many bytes of arguments rotate, so that none is still cached when its turn comes."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else last_level_cache()
    return max(POOL_BYTES, 2 * cache)


def describe(device: torch.device) -> dict[str, Any]:
    """The part of a result that says where it was measured."""
    about: dict[str, Any] = {
        "cpu": cpu_name(),
        "isa": instruction_set(),
        "last_level_cache": last_level_cache(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "device": device.type,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        about |= {
            "gpu": properties.name,
            "gpu_memory": properties.total_memory,
            "gpu_l2": properties.L2_cache_size,
            "multiprocessors": properties.multi_processor_count,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
        }
    return about | {
        "versions": versions(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


class OtherWork:
    """The CPU time that others take while `with other_work:` blocks run: what disturbs times, ourselves left out.

    A load average would count the benchmark itself.
    """

    def __init__(self, clocks: Callable[[], tuple[float, float, float] | None] | None = None) -> None:
        self._clocks = clocks or _clocks
        self._wall = self._others = 0.0

    def __enter__(self) -> OtherWork:
        self._start = self._clocks()
        return self

    def __exit__(self, *exception: object) -> None:
        end = self._clocks()
        if self._start is not None and end is not None:
            wall, busy, own = (b - a for a, b in zip(self._start, end, strict=True))
            self._wall += wall
            self._others += max(0.0, busy - own)

    def processors(self) -> float | None:
        """How many processors others kept busy, on average; None where nobody says or too little was seen."""
        return self._others / self._wall if self._wall >= SHORTEST_WATCH else None


def _clocks() -> tuple[float, float, float] | None:
    """Seconds on the wall, of all processors' work, and of our own and our children's that have ended."""
    try:
        total = pathlib.Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
        user, nice, system, _, _, irq, softirq = (int(x) / os.sysconf("SC_CLK_TCK") for x in total[:7])
    except (OSError, ValueError):
        return None
    return time.monotonic(), user + nice + system + irq + softirq, sum(os.times()[:4])


def other_work(about: dict[str, Any]) -> str:
    """What a result says of other work, as a sentence or "": under a tenth of a processor is a machine's own noise."""
    if "load" in about:
        return f"Load average {about['load']:.1f}, this run's own work included: what others took was not measured."
    found = about["other_work"]
    return f"Other work kept {found:.1f} processors busy: times are high and spread." if found and found >= 0.1 else ""


def cpu_name() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    found = {key.strip(): value.strip() for key, value in fields.items()}
    name = found.get("model name", platform.machine())
    return f"{name}, family {found['cpu family']} model {found['model']}" if "cpu family" in found else name


def instruction_set() -> str:
    """What our kernels run on here, and what PyTorch's do."""
    ours = "no native kernels"
    if not _native.error:
        isa, attention = _native._C.isa, _native._C.attention_isa
        ours = f"onepass {isa}" + ("" if attention == isa else f", attention {attention}")
    return f"{ours}, torch {torch.backends.cpu.get_cpu_capability()}"


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "onepass": onepass.__version__}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if not _native.error:
        found["compiler"] = _native._C.compiler
    return found


def commit() -> str:
    """The checkout's commit, marked where files differ from it; outside a checkout the installed version."""
    here = pathlib.Path(__file__).resolve().parent
    try:
        git = ["git", "-C", str(here)]
        tracked = subprocess.run([*git, "ls-files", "--error-unmatch", __file__], capture_output=True, check=False)
        if tracked.returncode == 0:
            head = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True, check=True)
            dirty = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
            return head.stdout.strip() + ("+changes" if dirty.stdout.strip() else "")
    except (OSError, subprocess.SubprocessError):
        pass
    return f"v{onepass.__version__}"


def measure(pool: Pool, dtypes: Iterable[torch.dtype], *, quick: bool = False) -> Rates:
    """The ceilings, in a few seconds; `quick` makes fewer passes and smaller CPU matrices."""
    device, passes = pool.device, 3 if quick else 9
    # Many, since one pass is a few milliseconds: on a busy machine most of them are disturbed.
    read, copy = (_fastest_bandwidth(loops, device, 5 * passes) for loops in pool.loops())
    full = 8192 if device.type == "cuda" else (1024 if quick else 2048)

    def flops(dtype: torch.dtype, side: int, passes: int) -> float:
        a, b = (torch.randn(side, side, device=device, dtype=torch.float32).to(dtype) for _ in range(2))
        return 2 * side**3 / _fastest(functools.partial(torch.mm, a, b), device, passes)

    matmul = {"float32": flops(torch.float32, full, passes)}
    for dtype in sorted({torch.bfloat16, torch.float16} & {*dtypes}, key=str):
        # Without instructions for it torch walks a 16-bit product element by element, minutes at full size: floats win.
        slow = device.type == "cpu" and flops(dtype, 256, 9) < matmul["float32"] / 10
        matmul[name_of(dtype)] = matmul["float32"] if slow else flops(dtype, full, passes)
    return Rates(read[1], copy[1], matmul, {"read": read[0], "copy": copy[0]})


def as_dict(rates: Rates) -> dict[str, Any]:
    return asdict(rates)


def _fastest(run: Callable[[], Any], device: torch.device, passes: int) -> float:
    run()
    times = []
    for _ in range(passes):
        if device.type == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            run()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end) * 1e-3)
        else:
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
    return min(times)


def _fastest_bandwidth(loops: dict[str, Loop], device: torch.device, passes: int) -> tuple[str, float]:
    size = pool_bytes(device)
    rates = {name: size / _fastest(functools.partial(loop, 0, size), device, passes) for name, loop in loops.items()}
    winner = max(rates, key=rates.__getitem__)
    return winner, rates[winner]


Loop = Callable[[int, int], Any]  # moves `size` bytes from `start` of the pool


class Pool:
    """Memory larger than the caches, and the loops that compete over it: reading it, and copying half of it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.source = torch.ones(pool_bytes(device), dtype=torch.int8, device=device).view(torch.float32)
        self.target = torch.zeros_like(self.source)

    def loops(self) -> tuple[dict[str, Loop], dict[str, Loop]]:
        """Those that read and those that copy, the latter `size / 2` bytes read and as many written."""
        read: dict[str, Loop] = {"torch.sum": lambda start, size: self._of(self.source, start, size).sum()}
        copy: dict[str, Loop] = {
            "torch.copy_": lambda start, size: self._of(self.target, start, size // 2).copy_(
                self._of(self.source, start, size // 2)
            )
        }
        if self.device.type == "cuda":
            return read, copy
        threads, a, b = torch.get_num_threads(), self.source.data_ptr(), self.target.data_ptr()
        if not _native.error:
            read["onepass"] = lambda start, size: _native._C.read_bytes(a + start, size, threads)
            copy["onepass"] = lambda start, size: _native._C.copy_bytes(a + start, b + start, size // 2, threads)
        else:
            workers = ThreadPoolExecutor(threads)
            parts = lambda x, start, size: numpy.array_split(self._of(x, start, size).numpy(), threads)
            read["numpy"] = lambda start, size: list(workers.map(numpy.max, parts(self.source, start, size)))
            copy["numpy"] = lambda start, size: list(
                workers.map(numpy.copyto, parts(self.target, start, size // 2), parts(self.source, start, size // 2))
            )
        return read, copy

    @staticmethod
    def _of(x: torch.Tensor, start: int, size: int) -> torch.Tensor:
        return x[start // 4 : (start + size) // 4]


class Ceiling:
    """The rate that binds a case, as one more run in its rounds: what disturbs them disturbs it as well.

    A call reads or copies as many bytes as the case, past the caches, or multiplies matrices; `scale` times its seconds
    are those of the case's work.
    """

    def __init__(self, pool: Pool, rates: Rates, reads: int, writes: int, flops: int, dtype: torch.dtype) -> None:
        bound, _ = rates.bound(reads, writes, flops, dtype)
        if bound == "matmul":
            side = 2048 if flops > 1 << 33 else 1024
            # As `measure` did where the dtype has no product of its own.
            slow = rates.matmul.get(name_of(dtype)) in (None, rates.matmul["float32"])
            a, b, c = (torch.ones(side, side, dtype=torch.float32 if slow else dtype) for _ in range(3))
            self.scale = flops / (2 * side**3)
            self._call: Callable[[], Any] = functools.partial(torch.mm, a, b, out=c)
            return
        total, whole = reads + writes, pool_bytes(pool.device)
        kind = "read" if writes < 0.1 * total else "copy"
        loops = dict(zip(("read", "copy"), pool.loops(), strict=True))[kind]
        loop = loops.get(rates.winners.get(kind, ""), loops["torch.sum" if kind == "read" else "torch.copy_"])
        size = min(whole, -(-total // 128) * 128)
        starts = itertools.cycle(range(0, whole - size + 1, size))
        self.scale = total / size
        self._call = lambda: loop(next(starts), size)

    def __call__(self, *_: Any) -> None:
        self._call()
