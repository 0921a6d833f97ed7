"""Prints docs/performance.md: `python -m onepass.benches.performance [FOLDER]`, from a checkout.

A measured time is in the page if and only if it is in a result file: the bench.json of an `onepass bench`, renamed.
Beside it stands the time predicted before measuring (predict.py), also for a GPU that nobody has measured.
"""

from __future__ import annotations

import math
import pathlib
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from . import predict
from .cli import cases, stems
from .harness import Case, Row
from .machine import Rates, name_of, other_work
from .report import duration, grouped, load_json, rate, ratio

RESULTS = pathlib.Path(__file__).parent / "results"
UNMEASURED = "unmeasured"
HOST = "dispatch"  # what a call costs the host: nothing to predict
HEAD = """# Performance

Made by `python -m onepass.benches.performance` from `benches/results/`: do not edit. How times are taken is in
[benchmarks.md](benchmarks.md); the JSON has every percentile, error and command.

**Predicted** is the least time that the work can take: the larger of a case's bytes (each input read once, each output
written once) at the memory rate and its FLOPs at the matrix rate, on a GPU also of the instructions that the kernels
issue; the word behind it says which. On a CPU the rates are those measured in the same run. Predictions stay when a
measurement comes.
**Best peer** is the fastest of everything else in the run: eager PyTorch, `torch.compile`, other libraries. **Ratio**
is its time over ours; below 1 we lose. Medians; ratios inside a row mean more than times.
"""
COLUMNS = ("case", "shape", "dtype", "device", "predicted", "measured", "best peer", "ratio", "date", "commit")


@dataclass(frozen=True)
class Line:
    """A case on a device: what it should take and, where somebody ran it, what it took."""

    stem: str
    case: str
    shape: str
    dtype: str
    device: str
    bound: str  # what binds, empty where nothing is predicted
    predicted: float | None
    date: str = ""
    commit: str = ""
    rows: tuple[Row, ...] = ()  # ours first, then the others from fast to slow

    @property
    def ours(self) -> Row | None:
        return min((r for r in self.rows if r.ours and r.median), key=lambda r: r.median or 0.0, default=None)

    @property
    def peer(self) -> Row | None:
        return min((r for r in self.rows if not r.ours and r.median), key=lambda r: r.median or 0.0, default=None)

    @property
    def ratio(self) -> float | None:
        ours, peer = self.ours, self.peer
        return (peer.median or 0.0) / (ours.median or 1.0) if ours and peer else None

    def cells(self) -> Iterable[str]:
        ours, peer = self.ours, self.peer
        failed = next((f"{r.status}: {r.reason}".replace("|", "/") for r in self.rows if r.ours and not r.median), "")
        yield from (self.case, self.shape, self.dtype, self.device)
        yield f"{duration(self.predicted)}, {self.bound}" if self.bound else "-"
        yield (duration(ours.median) + (" (reference)" if ours.backend == "reference" else "")) if ours else (
            failed or UNMEASURED
        )
        yield f"{peer.implementation}, {duration(peer.median)}" if peer else UNMEASURED
        yield "" if self.ratio is None else ratio(self.ratio) + (" **loses**" if self.ratio < 1 else "")
        yield from (self.date, self.commit)


def page(folder: pathlib.Path = RESULTS) -> str:
    results = [load_json(path) for path in sorted(folder.glob("*.json"))]
    known = {(stem, case.name): case for stem in stems() for case in cases(stem, torch.device("cpu"))}
    lines = [line for result in results for line in _measured(known, *result)]
    timed = {(x.stem, x.case, x.shape) for x in lines if any(row.device == "cuda" for row in x.rows)}
    lines += [x for x in _expected(known) if (x.stem, x.case, x.shape) not in timed]
    parts = [HEAD, predict.TEXT, _summary(lines)]
    head = [_table_row(COLUMNS), "|---" * len(COLUMNS) + "|"]
    for stem in sorted({line.stem for line in lines}):
        mine = [line for line in lines if line.stem == stem]
        parts.append("\n".join([f"## {stem}\n", *head, *(_table_row(line.cells()) for line in mine), ""]))
    parts += [_details(*result) for result in results]
    return "\n".join(parts)


def _measured(
    known: dict[tuple[str, str], Case], about: dict[str, Any], rates: dict[str, Any], rows: list[Row]
) -> Iterator[Line]:
    limits = Rates(rates["read"], rates["copy"], rates["matmul"])
    for (_, name, shape, dtype), group in grouped(rows).items():
        stem = group[0].stem
        case = known.get((stem, name))
        same = case is not None and (case.shape, name_of(case.dtype)) == (shape, dtype)
        predicted: tuple[str, float | None] = ("", None)
        if case is not None and same and stem != HOST:
            on_gpu = about["device"] == "cuda"
            predicted = predict.on_gpu(stem, case) if on_gpu else limits.bound(
                case.reads, case.writes, case.flops, case.dtype
            )
        yield Line(
            stem, name, shape, dtype, _device(about), *predicted, about["date"][:10], about["commit"], tuple(group)
        )


def _expected(known: dict[tuple[str, str], Case]) -> Iterator[Line]:
    """Every case on a GPU, unmeasured."""
    for (stem, name), case in known.items():
        predicted = ("", None) if stem == HOST else predict.on_gpu(stem, case)
        yield Line(stem, name, case.shape, name_of(case.dtype), predict.H200.name, *predicted)


def _device(about: dict[str, Any]) -> str:
    return str(about["gpu"]) if about["device"] == "cuda" else f"{about['cpu']}, {about['threads']} thread" + (
        "s" if about["threads"] > 1 else ""
    )


def _table_row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _summary(lines: list[Line]) -> str:
    out = [
        "## Summary", "",
        "| stem | device | cases | against the best peer | cases that lose | of the binding rate | date | commit |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for stem, device, date, commit in sorted({(x.stem, x.device, x.date, x.commit) for x in lines}):
        mine = [x for x in lines if (x.stem, x.device, x.date, x.commit) == (stem, device, date, commit)]
        ratios = [x.ratio for x in mine if x.ratio is not None]
        shares = [(x.ours.ceiling or x.predicted) / x.ours.median for x in mine if x.predicted and x.ours
                  and x.ours.median and not x.ours.cache_resident]
        middle = ratio(math.exp(sum(map(math.log, ratios)) / len(ratios))) if ratios else UNMEASURED
        spread = f" ({ratio(min(ratios))} to {ratio(max(ratios))})" if len(ratios) > 1 else ""
        bound = f"{min(shares):.0%} to {max(shares):.0%}" if shares else UNMEASURED if not ratios else "-"
        lost = ", ".join(x.case for x in mine if x.ratio is not None and x.ratio < 1) or ("none" if ratios else "-")
        out.append(_table_row((stem, device, str(len(mine)), middle + spread, lost, bound, date, commit)))
    return "\n".join([*out, "", "Against the best peer: geometric mean, least and largest ratio of the cases.", ""])


def _details(about: dict[str, Any], rates: dict[str, Any], rows: list[Row]) -> str:
    """Everybody's times, a line a case, behind a fold."""
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    products = ", ".join(f"{name} {rate(value, 'FLOP/s')}" for name, value in rates["matmul"].items())
    out = [
        f"<details><summary>All implementations on {_device(about)}, {about['date'][:10]}, commit {about['commit']}"
        "</summary>", "",
        f"{about['isa']}; {versions}.",
        f"Measured rates: read {rate(rates['read'], 'B/s')}, copy {rate(rates['copy'], 'B/s')}, torch.mm {products}. "
        f"{other_work(about)}".rstrip(), "",
        "| stem | case | dtype | ours, p20 to p80 | rounds | error | the others |", "|---|---|---|---|---|---|---|",
    ]
    for (_, case, _, dtype), group in grouped(rows).items():
        told = [r for r in group if not r.ours]
        others = ", ".join(f"{r.implementation} {duration(r.median) or r.status}" for r in told)
        for row in (r for r in group if r.ours):
            name = case if row.implementation == "onepass" else f"{case}, {row.implementation.removeprefix('onepass ')}"
            spread = f"{duration(row.p20)} to {duration(row.p80)}" if row.median else f"{row.status}: {row.reason}"
            error = "" if row.error is None else f"{row.error:.0e}"
            out.append(_table_row((row.stem, name, dtype, spread.replace("|", "/"), str(row.n), error, others)))
    return "\n".join([*out, "", "</details>", ""])


if __name__ == "__main__":
    sys.stdout.write(page(*map(pathlib.Path, sys.argv[1:])))
