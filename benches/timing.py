"""Times of several implementations in one run.

The implementations take turns, so that a machine that drifts hits all alike, and each call takes the next arguments of
a ring that is larger than the last-level cache. What a call returns is kept until its place in the ring comes round
again: without that the allocator would hand the same, still cached, buffer to every call. A turn on a CPU is several
calls: the first finds the caches full of another implementation's code, and is told apart.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

Run = Callable[..., Any]

ROUNDS = (7, 300)  # fewest and most samples of a row
TURN_SECONDS = 4e-3  # of one implementation on a CPU, where the ring has arguments for so many calls
MAX_SETS = 4096
MOST_TOUCHED = 4 << 30  # bytes


def tensor_bytes(tree: Any) -> int:
    """Bytes of the storages behind the tensors of a nest of tuples, lists and dicts, each counted once."""
    storages = [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def copied(tree: Any) -> Any:
    """The same nest with every tensor copied; a leaf that asks for gradients stays such a leaf."""

    def copy(leaf: Any) -> Any:
        return leaf.detach().clone().requires_grad_(leaf.requires_grad) if isinstance(leaf, torch.Tensor) else leaf

    return tree_map(copy, tree)


class Ring:
    """Copies of one set of arguments, `total` bytes in all, handed out in turn."""

    def __init__(self, arguments: tuple, total: int) -> None:
        size = max(1, tensor_bytes(arguments))
        count = min(MAX_SETS, max(2, math.ceil(total / size)))
        self.sets = [arguments, *(copied(arguments) for _ in range(count - 1))]
        self.kept: list[Any] = [None] * count
        self.cache_resident = count * size < total
        self._next = 0

    def take(self, count: int) -> range:
        """The places of the next `count` sets, to be read modulo the ring's length."""
        start, self._next = self._next, (self._next + count) % len(self.sets)
        return range(start, start + count)

    def arguments(self, places: range) -> list[tuple]:
        return [self.sets[place % len(self.sets)] for place in places]

    def keep(self, places: range, results: Sequence[Any]) -> None:
        for place, result in zip(places, results, strict=True):
            self.kept[place % len(self.sets)] = result


@dataclass(frozen=True)
class Times:
    """Seconds per call, one entry a round. On a GPU this is device time and `host` the CPU's seconds per call; on a CPU
    `first` is the median of the first calls of turns."""

    samples: list[float]
    host: float | None = None
    first: float | None = None

    def quantile(self, q: float) -> float:
        ordered = sorted(self.samples)
        at = q * (len(ordered) - 1)
        low = math.floor(at)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def interleaved(runs: Mapping[str, Run], ring: Ring, device: torch.device, seconds: float) -> dict[str, Times]:
    """Times of every implementation, about `seconds` for each."""
    measure = _on_cuda if device.type == "cuda" else _on_cpu
    with _quiet_collector():
        return measure(runs, ring, seconds)


@functools.cache
def _keep_freed_memory() -> None:
    """Have glibc reuse what is freed: pages given back to the system come back one fault at a time, and whose call pays
    for that depends on what the others allocate. Elsewhere nothing happens."""
    trim_threshold, mmap_max = -1, -4  # of malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, -1)  # never


def _have_touched(size: int) -> None:
    """Take so many bytes from the system and free them: pages that come one fault at a time come now, untimed."""
    torch.empty(min(size, MOST_TOUCHED), dtype=torch.uint8).zero_()


@contextlib.contextmanager
def _quiet_collector() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _rounds(seconds: float, per_round: float, runs: int) -> int:
    return max(ROUNDS[0], min(ROUNDS[1], round(seconds * runs / max(per_round, 1e-9))))


def _in_turn(names: Sequence[str], rounds: int) -> Iterator[str]:
    """Every name once a round, each round beginning one later: nobody is always the first."""
    for r in range(rounds):
        shift = r % len(names)
        yield from [*names[shift:], *names[:shift]]


def _on_cpu(runs: Mapping[str, Run], ring: Ring, seconds: float) -> dict[str, Times]:
    _keep_freed_memory()

    def turn(name: str, count: int) -> tuple[float, float]:
        """Seconds of the first call, and of a call on average."""
        run, places = runs[name], ring.take(count)
        first, *others = ring.arguments(places)
        start = time.perf_counter_ns()
        results = [run(*first)]
        after_first = time.perf_counter_ns()
        for arguments in others:
            results.append(run(*arguments))
        end = time.perf_counter_ns()
        ring.keep(places, results)
        return (after_first - start) * 1e-9, (end - start) * 1e-9 / count

    def quickest(name: str) -> float:
        """Seconds of the quickest of six calls, or of the two that exceed `seconds`."""
        until, best = time.perf_counter() + seconds, math.inf
        for i in range(6):
            best = min(best, turn(name, 1)[1])
            if i and time.perf_counter() > until:
                break
        return best

    calls = {}
    per_round = 0.0
    turn(next(iter(runs)), 1)
    _have_touched(len(ring.sets) * tensor_bytes(ring.kept))  # until each place keeps a result, each is new memory
    for name in runs:
        turn(name, 1)
        guess = quickest(name)
        calls[name] = min(len(ring.sets), max(1, math.ceil(TURN_SECONDS / max(guess, 1e-8))))
        per_round += guess * calls[name]
    for name in runs:
        turn(name, calls[name])
    firsts: dict[str, list[float]] = {name: [] for name in runs}
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for name in _in_turn(list(runs), _rounds(seconds, per_round, len(runs))):
        first, mean = turn(name, calls[name])
        firsts[name].append(first)
        samples[name].append(mean)
    return {name: Times(values, first=statistics.median(firsts[name])) for name, values in samples.items()}


def _on_cuda(runs: Mapping[str, Run], ring: Ring, seconds: float) -> dict[str, Times]:
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    flush = torch.empty(max(256 << 20, 4 * properties.L2_cache_size), dtype=torch.int8, device="cuda")
    cycles_per_second = 2e9  # of the spin kernel: at or above today's clocks, so the wait is never short

    def enqueue(name: str, count: int) -> float:
        places, results = ring.take(count), []
        start = time.perf_counter_ns()
        for arguments in ring.arguments(places):
            results.append(runs[name](*arguments))
        elapsed = (time.perf_counter_ns() - start) * 1e-9
        ring.keep(places, results)
        return elapsed / count

    def once(name: str) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        flush.zero_()
        # While the device spins the host queues the whole call: launch gaps are host time, which has its own column.
        torch.cuda._sleep(int(min(0.02, 2 * host[name] + 2e-5) * cycles_per_second))
        begin.record()
        enqueue(name, 1)
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) * 1e-3

    host: dict[str, float] = {}
    per_round = 0.0
    for name in runs:
        enqueue(name, 2)
        torch.cuda.synchronize()
        batches = []
        for _ in range(5):
            batches.append(enqueue(name, 8))
            torch.cuda.synchronize()
        host[name] = sorted(batches)[2]
        start = time.perf_counter()
        once(name)
        per_round += time.perf_counter() - start
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for name in _in_turn(list(runs), _rounds(seconds, per_round, len(runs))):
        samples[name].append(once(name))
    return {name: Times(values, host[name]) for name, values in samples.items()}
