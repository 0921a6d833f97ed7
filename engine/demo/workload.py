"""What every workload of the demo shares: the two sides, how they are timed, and what a workload hands back."""
from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import torch

T = TypeVar("T")


class Bar:
    """Where a workload stands; the demo's progress bar and the tests' silence are both this."""

    def start(self, total: int) -> None:
        """Begin again with `total` ticks ahead."""

    def tick(self) -> None:
        """One of them is done."""


class Stopwatch:
    """Seconds spent inside `with stopwatch:`, added up; on a GPU the queue is drained at both ends."""

    def __init__(self, device: torch.device) -> None:
        self.seconds = 0.0
        self._drain = torch.cuda.synchronize if device.type == "cuda" else None

    def __enter__(self) -> None:
        if self._drain:
            self._drain()
        self._start = time.perf_counter()

    def __exit__(self, *exception: object) -> None:
        if self._drain:
            self._drain()
        self.seconds += time.perf_counter() - self._start


@dataclass(frozen=True)
class Side:
    """One way of doing a workload: medians over its repeats."""

    seconds: float      # the whole workload
    op_seconds: float   # inside the op that onepass replaces

    @property
    def share(self) -> float:
        return self.op_seconds / self.seconds


@dataclass(frozen=True)
class Figure:
    """A picture (encoded bytes and their MIME type) or a passage of text."""

    title: str
    caption: str
    content: bytes | str
    mime: str = "text/plain"


@dataclass(frozen=True)
class Result:
    name: str
    what: str           # the workload in one line
    op: str             # the op that differs between the sides
    stock: Side
    onepass: Side
    agrees: bool
    agreement: str      # the check in a few words
    notes: list[str] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)


def race(
    stock: Callable[[Stopwatch], T], onepass: Callable[[Stopwatch], T], device: torch.device, bar: Bar, repeats: int
) -> tuple[T, T, Side, Side]:
    """Run both sides by turns: once to warm up, whose results come back, then `repeats` times for the medians.

    A side wraps its op in the stopwatch it is given. The sides alternate, and so does which goes first, so that neither
    gains from what the machine is doing meanwhile.
    """
    sides = (stock, onepass)
    times: tuple[list[tuple[float, float]], ...] = ([], [])
    bar.start(2 * (1 + repeats))
    results = []
    for side in sides:
        results.append(side(Stopwatch(device)))
        bar.tick()
    for repeat in range(repeats):
        for which in (0, 1) if repeat % 2 == 0 else (1, 0):
            whole, op = Stopwatch(device), Stopwatch(device)
            with whole:
                sides[which](op)
            times[which].append((whole.seconds, op.seconds))
            bar.tick()
    medians = [Side(*(statistics.median(column) for column in zip(*rows, strict=True))) for rows in times]
    return results[0], results[1], medians[0], medians[1]
