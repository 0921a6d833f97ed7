"""What a benchmark is made of: a Case says what to run, `measure` turns it into Rows.

Every implementation is checked against the reference in float64 before it is timed. Ours must be within twice the error
of same-dtype PyTorch plus one ulp of the output's largest value; others get PEERS times that room, and their error is
shown. What fails is not timed and its row says why.
"""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from onepass import registry
from onepass._ops import forget

from .machine import Ceiling, Pool, Rates, name_of, pool_bytes
from .timing import Ring, Run, Times, copied, interleaved

PEERS = 8
COMPILED = "torch.compile"
CEILING = "the bound"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One workload and everybody who can do it.

    `implementations` maps a name to a callable of the arguments that `make` returns. Ours are named "onepass" or
    "onepass/<backend>"; "eager" is plain PyTorch in the row's dtype and must be there. The harness adds torch.compile.
    """

    op: str
    name: str  # unique in its stem: `onepass bench STEM --only NAME`
    shape: str  # for people: "B1 H32/8 D128 L4096"
    dtype: torch.dtype
    make: Callable[[torch.device], tuple]  # one set of arguments, seeded by the harness; copies of it rotate
    implementations: Mapping[str, Run]
    reference: Run  # called with the arguments in float64
    reads: int  # bytes that must be read once
    writes: int  # bytes that must be written once
    formula: str  # how bytes and FLOPs were counted
    flops: int = 0  # causal work counts half
    compiled: Run | None = None  # what torch.compile gets; by default the eager implementation
    yardstick: Run | None = None  # same-dtype PyTorch with the reference's numbers; by default the eager implementation
    uncompared: frozenset[str] = frozenset()  # draw other random numbers, so their values cannot be checked
    goal: str = ""  # what the fused implementation is to reach, in words that its row's numbers answer
    quick: bool = True  # belongs to `--quick`


@dataclass
class Row:
    """One implementation of one case. Times are seconds; on a GPU the device's, with `host` beside them."""

    op: str
    case: str
    implementation: str
    backend: str  # which of ours took the call ("cpu", "reference", ...); empty for others
    device: str
    shape: str
    dtype: str
    status: str = "ok"  # or "failed" (its check), "skipped" (could not run)
    reason: str = ""
    median: float | None = None
    p20: float | None = None
    p80: float | None = None
    n: int = 0
    first: float | None = None  # the first call of a turn, after the others' code: on a CPU
    host: float | None = None
    error: float | None = None  # largest absolute difference from the reference; None where values differ by design
    allowed: float | None = None
    bytes: int = 0
    flops: int = 0
    formula: str = ""
    bound: str = ""  # the measured rate that binds: "memory" or "matmul"
    ceiling: float | None = None  # seconds that this rate's own loop took in the same rounds, for the case's work
    of_bound: float | None = None  # share of that rate, 1 is all of it; None where the cache serves the memory
    speedup: float | None = None  # over eager: below 1 is a loss
    lead: float | None = None  # over the best of the others
    cache_resident: bool = False
    goal: str = ""
    command: str = ""

    @property
    def stem(self) -> str:
        """The file of cases that the row is from, as its command names it."""
        words = self.command.split()
        return words[2] if len(words) > 2 else ""

    @property
    def ours(self) -> bool:
        return self.implementation.startswith("onepass")


@dataclass(frozen=True)
class Settings:
    device: torch.device
    seconds: float = 1.0  # of timing for each implementation
    compile_seconds: float = 90.0  # 0 leaves torch.compile out
    pool: int | None = None  # bytes that rotate; by default what the machine's caches ask for
    ceilings: Pool | None = None  # where the loops of the binding rates take their turn; none: rows against Rates alone
    command: str = "onepass bench"
    on_step: Callable[[str], None] = field(default=lambda text: None)  # progress
    watch: contextlib.AbstractContextManager[Any] = field(default_factory=contextlib.nullcontext)  # of the timing alone


def measure(case: Case, rates: Rates, settings: Settings) -> list[Row]:
    """Check every implementation, then time those that passed, taking turns."""
    device = settings.device
    arguments = inputs(case, device)
    runs, rows = dict(case.implementations), {}
    for name in [*runs, *([COMPILED] if settings.compile_seconds else [])]:
        rows[name] = Row(case.op, case.name, name, "", device.type, case.shape, name_of(case.dtype))
        rows[name].command, rows[name].goal = settings.command, case.goal

    if COMPILED in rows:
        settings.on_step(f"{case.name}: torch.compile")
        try:
            runs[COMPILED] = _compiled(case, arguments, settings.compile_seconds)
        except Exception as error:  # whatever a compiler throws, the row says it
            rows[COMPILED].status, rows[COMPILED].reason = "skipped", _first_line(error)

    verdict = Verdict(case, arguments)
    for name in runs:
        settings.on_step(f"{case.name}: checking {name}")
        row = rows[name]
        try:
            with _backends() as chosen:
                row.error, row.allowed, row.reason = verdict(name, runs[name](*copied(arguments)))
            row.backend = "+".join(sorted(chosen)) if row.ours else ""
            row.status = "failed" if row.reason else "ok"
        except Exception as error:
            row.status, row.reason = "skipped", _first_line(error)

    passed = {name: run for name, run in runs.items() if rows[name].status == "ok"}
    if passed:
        settings.on_step(f"{case.name}: timing {len(passed)} implementations")
        ring = Ring(arguments, settings.pool if settings.pool is not None else pool_bytes(device))
        if settings.ceilings:
            passed[CEILING] = ceiling = Ceiling(
                settings.ceilings, rates, case.reads, case.writes, case.flops, case.dtype
            )
        with settings.watch:
            times = interleaved(passed, ring, device, settings.seconds)
        limit = times.pop(CEILING).quantile(0.5) * ceiling.scale if settings.ceilings else None
        _fill(case, rows, times, rates, ring.cache_resident, limit)
    return list(rows.values())


def inputs(case: Case, device: torch.device) -> tuple:
    """One set of arguments, the same in every run."""
    torch.manual_seed(0)
    return case.make(device)


def _fill(
    case: Case, rows: dict[str, Row], times: dict[str, Times], rates: Rates, cache_resident: bool, limit: float | None
) -> None:
    bound, seconds = rates.bound(case.reads, case.writes, case.flops, case.dtype)
    medians = {name: t.quantile(0.5) for name, t in times.items()}
    others = [median for name, median in medians.items() if not rows[name].ours]
    for name, t in times.items():
        row, median = rows[name], medians[name]
        row.median, row.p20, row.p80, row.n = median, t.quantile(0.2), t.quantile(0.8), len(t.samples)
        row.first, row.host = t.first, t.host
        row.bytes, row.flops, row.formula = case.reads + case.writes, case.flops, case.formula
        row.bound, row.ceiling, row.cache_resident = bound, limit, cache_resident
        row.of_bound = None if cache_resident and bound == "memory" else (limit or seconds) / median
        row.speedup = medians["eager"] / median if "eager" in medians else None
        row.lead = min(others) / median if others and row.ours else None


class Verdict:
    """Holds what implementations return against the reference in float64 and the error of same-dtype PyTorch."""

    def __init__(self, case: Case, arguments: tuple) -> None:
        self.case = case
        self.truth = tree_leaves(case.reference(*_double(arguments)))
        same_dtype = (case.yardstick or case.implementations["eager"])(*copied(arguments))
        self.room = _errors(tree_leaves(same_dtype), self.truth)
        for error, true in zip(self.room, self.truth, strict=True):
            largest = _largest(true)
            if not error <= largest * (0.05 if case.dtype.itemsize == 2 else 1e-3):
                raise ValueError(f"PyTorch itself is off by {error:.3g} where values reach {largest:.3g}")

    def __call__(self, name: str, result: Any) -> tuple[float | None, float | None, str]:
        """The largest error, what is allowed, and why it fails or ""."""
        if name in self.case.uncompared:
            return None, None, ""
        leaves = tree_leaves(result)
        errors = _errors(leaves, self.truth)
        slack = 1 if name.startswith("onepass") else PEERS
        allowed = [
            slack * (2 * error + _largest(true) * torch.finfo(leaf.dtype).eps) if leaf.is_floating_point() else 0.0
            for leaf, true, error in zip(leaves, self.truth, self.room, strict=True)
        ]
        for i, (error, room) in enumerate(zip(errors, allowed, strict=True)):
            if not error <= room:
                return error, room, f"output {i} is off by {error:.3g}, {room:.3g} is allowed"
        return max(errors, default=0.0), max(allowed, default=0.0), ""


@contextlib.contextmanager
def _backends() -> Iterator[set[str]]:
    """The backends that calls inside the block go to."""
    chosen: set[str] = set()
    choose = registry.choose

    def noting(*args: Any, **options: Any) -> str:
        chosen.add(name := choose(*args, **options))
        return name

    with mock.patch.object(registry, "choose", noting), warnings.catch_warnings():
        warnings.simplefilter("ignore", registry.FallbackWarning)  # the row says it
        forget()  # or a call like an earlier one would not choose
        yield chosen


def _double(tree: Any) -> Any:
    def widen(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        wide = leaf.detach().double() if leaf.is_floating_point() else leaf.detach().clone()
        return wide.requires_grad_(leaf.requires_grad)

    return tree_map(widen, tree)


def _errors(leaves: list[Any], truth: list[Any]) -> list[float]:
    """Largest absolute difference of each output; NaN or a misplaced infinity counts as infinite."""
    if len(leaves) != len(truth):
        raise ValueError(f"returned {len(leaves)} outputs, the reference {len(truth)}")
    found = []
    for ours, true in zip(leaves, truth, strict=True):
        if ours.shape != true.shape:
            raise ValueError(f"returned shape {tuple(ours.shape)}, the reference {tuple(true.shape)}")
        if not ours.numel():
            found.append(0.0)
            continue
        a, b = ours.detach().double(), true.detach().double()
        gap = torch.where(a == b, 0.0, (a - b).abs())
        worst = gap.max().item()
        found.append(worst if math.isfinite(worst) else math.inf)
    return found


def _largest(x: Tensor) -> float:
    finite = x.detach().double()
    finite = finite[finite.isfinite()]
    return finite.abs().max().item() if finite.numel() else 0.0


def _compiled(case: Case, arguments: tuple, seconds: float) -> Run:
    """Plain PyTorch through torch.compile, compiled here so that the time limit holds."""
    torch._dynamo.reset()
    compiled = torch.compile(case.compiled or case.implementations["eager"], dynamic=False)
    with _limit(seconds):
        compiled(*copied(arguments))
    return compiled


class _TooLong(BaseException):
    """Not an Exception: the compiler's own handlers must let it through."""


@contextlib.contextmanager
def _limit(seconds: float) -> Iterator[None]:
    """Interrupt the body after so many seconds, where this thread can receive signals."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def interrupt(*_: object) -> None:
        raise _TooLong

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except _TooLong:
        raise TimeoutError(f"took over {seconds:g} s to compile") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
