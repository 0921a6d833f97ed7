"""Prints docs/performance.md, made from benches/results/*.json: `python -m onepass.benches.performance [FOLDER]`.

A figure is in the page if and only if it is in a result file: the bench.json of an `onepass bench`, renamed.
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Iterable
from typing import Any

from .harness import Row
from .machine import other_work
from .report import duration, grouped, label, load_json, rate, ratio

RESULTS = pathlib.Path(__file__).parent / "results"
HEAD = """# Performance

Made by `python -m onepass.benches.performance` from `benches/results/`: do not edit. How rows are measured and what the
columns mean is in [benchmarks.md](benchmarks.md). Medians of one run; ratios inside a case mean more than times.
"""


def page(folder: pathlib.Path = RESULTS) -> str:
    results = [load_json(path) for path in sorted(folder.glob("*.json"))]
    parts = [HEAD]
    for kind, title in (("cpu", "CPU"), ("cuda", "GPU")):
        mine = [result for result in results if result[0]["device"] == kind]
        parts.append(f"## {title}\n")
        parts += [_machine(*result) for result in mine]
        if not mine:
            parts.append(f"Unmeasured: neither onepass nor a baseline has been timed on a {title} yet.\n")
    return "\n".join(parts)


def _machine(about: dict[str, Any], rates: dict[str, Any], rows: list[Row]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    products = ", ".join(f"{name} {rate(value, 'FLOP/s')}" for name, value in rates["matmul"].items())
    told = other_work(about)
    lines = [
        f"### {about.get('gpu', about['cpu'])}, {about['threads']} threads, {about['date'][:10]}",
        "",
        f"{about['isa']}; {versions}; commit {about['commit']}.",
        f"Measured rates: read {rate(rates['read'], 'B/s')}, copy {rate(rates['copy'], 'B/s')}, torch.mm {products}."
        + (f" {told}" if told else ""),
        "",
        "| case | shape | dtype | implementation | median | p20 to p80 | n | error | of bound | x eager |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (_, case, shape, dtype), group in grouped(rows).items():
        lines += [f"| {case} | {shape} | {dtype} | {' | '.join(_cells(row))} |" for row in group]
    return "\n".join([*lines, ""])


def _cells(row: Row) -> Iterable[str]:
    if row.median is None:
        return label(row), f"{row.status}: {row.reason}".replace("|", "/"), "", "", "", "", ""
    bound = "" if row.of_bound is None else f"{row.of_bound:.0%} of {row.bound}" if row.of_bound >= 5e-3 else "under 1%"
    against = "" if row.speedup is None else ratio(row.speedup)
    lost = row.ours and row.speedup is not None and row.speedup < 1
    return (
        label(row), duration(row.median), f"{duration(row.p20)} to {duration(row.p80)}", str(row.n),
        "" if row.error is None else f"{row.error:.0e}", bound, f"{against} **loses**" if lost else against,
    )


if __name__ == "__main__":
    sys.stdout.write(page(*map(pathlib.Path, sys.argv[1:])))
