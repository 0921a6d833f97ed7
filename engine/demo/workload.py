"""What every workload of the demo shares: the two sides, how they are timed, and what a workload hands back."""
from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch

T = TypeVar("T")

BUDGET = 30.0   # seconds that the repeats of one workload may take: a slow machine gets fewer of them


class Bar:
    """Where a workload stands; the demo's progress bar and the tests' silence are both this."""

    def start(self, total: int) -> None:
        """Begin again with `total` ticks ahead."""

    def tick(self) -> None:
        """One of them is done."""

    def shorten(self, total: int) -> None:
        """There are `total` ticks after all, those done included."""


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
class Time:
    """A median, and how far off it may be."""

    seconds: float
    margin: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Time:
        """The margin is twice the standard error of a median, with the deviation from the 20th and 80th percentile."""
        if len(samples) == 1:
            return cls(samples[0], math.inf)
        low, *_, high = statistics.quantiles(samples, n=5, method="inclusive")
        return cls(statistics.median(samples), 2 * 1.25 * (high - low) / 1.68 / len(samples) ** 0.5)

    def __add__(self, other: Time) -> Time:
        return Time(self.seconds + other.seconds, math.hypot(self.margin, other.margin))

    def __mul__(self, count: int) -> Time:
        return Time(self.seconds * count, self.margin * count)


@dataclass(frozen=True)
class Side:
    """One way of doing a workload."""

    whole: Time     # the whole workload
    op: Time        # inside the op that onepass replaces


@dataclass(frozen=True)
class Figure:
    """A picture (encoded bytes and their MIME type) or a passage of text."""

    title: str
    caption: str
    content: bytes | str
    mime: str = "text/plain"
    width: int | None = None    # pixels to show a picture at, its own by default


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
    """Run both sides by turns: once to warm up, whose results come back, then up to `repeats` times for the medians.

    A side wraps its op in the stopwatch it is given. The sides alternate, and so does which goes first, so that neither
    gains from what the machine is doing meanwhile.
    """
    sides = (stock, onepass)
    times: tuple[list[tuple[float, float]], ...] = ([], [])
    bar.start(2 * (1 + repeats))
    results = []
    warm_up = Stopwatch(device)
    for side in sides:
        with warm_up:
            results.append(side(Stopwatch(device)))
        bar.tick()
    repeats = max(1, min(repeats, int(BUDGET / warm_up.seconds)))
    bar.shorten(2 * (1 + repeats))
    for repeat in range(repeats):
        for which in (0, 1) if repeat % 2 == 0 else (1, 0):
            whole, op = Stopwatch(device), Stopwatch(device)
            with whole:
                sides[which](op)
            times[which].append((whole.seconds, op.seconds))
            bar.tick()
    medians = [Side(*(Time.of(column) for column in zip(*rows, strict=True))) for rows in times]
    return results[0], results[1], medians[0], medians[1]
