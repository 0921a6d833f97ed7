"""Rows for people and programs: a table of 80 columns, JSON, and a plot."""

from __future__ import annotations

import json
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .harness import Row
from .machine import other_work

Key = tuple[str, str, str, str]


def duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}" if seconds / size < 999.5 else f"{seconds / size:.0f} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def rate(per_second: float, unit: str) -> str:
    return f"{per_second / 1e12:.3g} T{unit}" if per_second >= 1e12 else f"{per_second / 1e9:.3g} G{unit}"


def ratio(value: float) -> str:
    return f"{value:.0f}x" if value >= 100 else f"{value:.1f}x" if value >= 10 else f"{value:.2f}x"


def label(row: Row) -> str:
    """The name, with the backend that took the call where the name does not say it."""
    return f"{row.implementation} ({row.backend})" if row.implementation == "onepass" else row.implementation


def grouped(rows: Iterable[Row]) -> dict[Key, list[Row]]:
    """Rows by case, ours first, then from fast to slow, then those without a time."""
    groups: dict[Key, list[Row]] = {}
    for row in rows:
        groups.setdefault((row.op, row.case, row.shape, row.dtype), []).append(row)
    order = lambda row: (not row.ours, row.median is None, row.median or 0.0)
    return {key: sorted(group, key=order) for key, group in groups.items()}


def print_header(console: Console, about: dict[str, Any], rates: dict[str, Any]) -> None:
    console.print(f"[bold]{about.get('gpu', about['cpu'])}[/], {about['threads']} CPU threads ({about['isa']})")
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    console.print(f"{versions}; commit {about['commit']}", highlight=False)
    products = ", ".join(f"{name} {rate(value, 'FLOP/s')}" for name, value in rates["matmul"].items())
    winners = rates["winners"]
    if told := other_work(about):
        console.print(told, style="red")
    console.print(
        f"measured here: read {rate(rates['read'], 'B/s')} ({winners['read']}), copy {rate(rates['copy'], 'B/s')} "
        f"({winners['copy']}), torch.mm {products}",
        highlight=False,
    )


def print_case(console: Console, key: Key, rows: list[Row]) -> None:
    op, case, shape, dtype = key
    console.print(Text.assemble("\n", (f"{op} ", "bold"), (case, "bold cyan"), f"  {shape}  {dtype}"))
    if goal := rows[0].goal:
        lead = next((row.lead for row in rows if row.lead is not None), None)
        console.print(f"goal: {goal}" + ("" if lead is None else f"; ours is {ratio(lead)} as fast as the best other"))
    on_device = any(row.host is not None for row in rows)
    table = Table(box=None, padding=(0, 1), header_style="dim", pad_edge=False)
    table.add_column("", min_width=15)
    for heading in ("median", "p20-p80", *(("host",) if on_device else ()), "n", "error", "of bound", "x eager"):
        table.add_column(heading, justify="right", no_wrap=True)
    notes = []
    for row in rows:
        if row.median is None:
            notes.append(f"{row.implementation}: {row.status}: {row.reason}")
            continue
        error = "" if row.error is None else f"{row.error:.0e}"
        of_bound = "" if row.of_bound is None or row.of_bound < 5e-4 else f"{row.of_bound:.0%} {row.bound[:3]}"
        against = "" if row.speedup is None else ratio(row.speedup)
        lost = row.speedup is not None and row.speedup < 1
        cells = [duration(row.median), f"{duration(row.p20)}-{duration(row.p80)}"]
        cells += [duration(row.host)] if on_device else []
        cells += [str(row.n), error, of_bound, f"{against} loses" if lost and row.ours else against]
        style = ("red" if lost else "green") if row.ours else ""
        table.add_row(Text(label(row), style=style), *cells[:-1], Text(cells[-1], style="red" if lost else ""))
    console.print(table)
    best = min((r for r in rows if not r.ours and r.median is not None), key=lambda r: r.median or 0.0, default=None)
    ours = max((r for r in rows if r.lead is not None), key=lambda r: r.lead or 0.0, default=None)
    if ours is not None and ours.lead is not None and best is not None and best.implementation != "eager":
        verb = "leads" if ours.lead >= 1 else "loses to"
        against = f"the best of the others, {best.implementation}"
        notes.insert(0, f"{ours.implementation} {verb} {against}: {ratio(ours.lead)}")
    if any(row.ours and row.backend == "reference" for row in rows):
        notes.append("no kernel takes this call on this device: onepass runs on its reference")
    if any(row.cache_resident for row in rows):
        notes.append("cache-resident: all sets of arguments together fit the last-level cache")
    if (limit := next((row.ceiling for row in rows if row.of_bound is not None), None)) is not None:
        work = "the same bytes moved" if rows[0].bound == "memory" else "the same FLOPs in torch.mm"
        notes.append(f"{work}, in the same rounds: {duration(limit)}")
    for note in notes:
        console.print(Text(f"  {note}", style="dim"), soft_wrap=False)
    console.print(Text(f"  {rows[0].command}", style="dim"))


def save_json(path: pathlib.Path, about: dict[str, Any], rates: dict[str, Any], rows: list[Row]) -> None:
    document = {"machine": about, "rates": rates, "rows": [asdict(row) for row in rows]}
    _replace(path, lambda part: part.write_text(json.dumps(document, indent=1) + "\n"))


def load_json(path: pathlib.Path) -> tuple[dict[str, Any], dict[str, Any], list[Row]]:
    document = json.loads(path.read_text())
    return document["machine"], document["rates"], [Row(**row) for row in document["rows"]]


def save_plot(path: pathlib.Path, about: dict[str, Any], rows: list[Row]) -> None:
    """Two panels of bars, a group a case: speed over eager PyTorch, and the share of the measured rate that binds."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter, PercentFormatter

    groups = {key: [row for row in group if row.median is not None] for key, group in grouped(rows).items()}
    groups = {key: group for key, group in groups.items() if group}
    bars = sum(map(len, groups.values()))
    figure = Figure(figsize=(11, 1.6 + 0.24 * bars + 0.34 * len(groups)), layout="constrained")
    speed, bound = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    y, ticks, labels, headings = 0.0, [], [], []
    for (op, case, shape, dtype), group in groups.items():
        headings.append((y - 0.15, f"{op}  {case}", f"{shape}  {dtype}"))
        y += 0.85
        speed.vlines(1, y - 0.5, y + len(group) - 0.5, color="#222", linewidth=0.8)
        bound.vlines(1, y - 0.5, y + len(group) - 0.5, color="#222", linewidth=0.8)
        for row in group:
            color = _colour(row)
            ratio_to_eager = row.speedup if row.speedup is not None else 1.0
            speed.barh(y, ratio_to_eager - 1, left=1, height=0.78, color=color)
            ahead = ratio_to_eager >= 1
            speed.annotate(
                f"{ratio(ratio_to_eager)}   {duration(row.median)}", (max(ratio_to_eager, 1), y),
                xytext=(4, 0), textcoords="offset points", va="center", fontsize=7.5,
                color="#222" if ahead or not row.ours else "#b3261e",
            )
            bound.barh(y, row.of_bound or 0.0, height=0.78, color=color)
            share = row.of_bound or 0.0
            text = "under 1%" if share < 5e-3 else f"{share:.0%} of {row.bound}"
            bound.annotate(
                "in cache" if row.of_bound is None else text, (share, y),
                xytext=(4, 0), textcoords="offset points", va="center", fontsize=7.5, color="#222",
            )
            ticks.append(y)
            labels.append(label(row))
            y += 1
        y += 0.55
    for at, title, detail in headings:
        speed.annotate(title, (0, at), xycoords=("axes fraction", "data"), xytext=(4, 0), textcoords="offset points",
                       va="center", fontsize=8.5, fontweight="bold")
        bound.annotate(detail, (1, at), xycoords=("axes fraction", "data"), ha="right", va="center",
                       fontsize=7.5, color="#666")
    ratios = [row.speedup for group in groups.values() for row in group if row.speedup]
    low, high = min([0.5, *ratios]), max([2.0, *ratios])
    speed.set_xscale("log", base=2)
    speed.set_xlim(low / 1.3, high * (high / low) ** 0.35)
    speed.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    speed.xaxis.set_minor_formatter(NullFormatter())
    speed.set_yticks(ticks, labels, fontsize=8)
    speed.set_ylim(y - 0.3, -0.7)
    speed.set_xlabel("speed over eager PyTorch, same run (log scale)")
    widest = max([1.0, *(row.of_bound or 0.0 for group in groups.values() for row in group)])
    bound.set_xlim(0, 1.45 * widest)
    bound.set_xticks([0, 0.25, 0.5, 0.75, 1])
    bound.xaxis.set_major_formatter(PercentFormatter(1.0))
    bound.set_xlabel("share of the measured rate that binds")
    for axis in (speed, bound):
        axis.grid(axis="x", color="#e3e3e3", linewidth=0.7)
        axis.set_axisbelow(True)
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
        axis.tick_params(axis="x", labelsize=8)
    versions = about["versions"]
    figure.suptitle(
        f"onepass {versions.get('onepass', '')} ({about['commit']}) on {about.get('gpu', about['cpu'])}, "
        f"{about['threads']} threads, torch {versions['torch']}", fontsize=10, x=0.01, ha="left",
    )
    _replace(path, lambda part: figure.savefig(part, dpi=150, format="png"))


def _colour(row: Row) -> str:
    if row.ours:
        return "#1a73e8" if row.speedup is None or row.speedup >= 1 else "#d93025"
    return {"eager": "#5f6368", "torch.compile": "#9aa0a6"}.get(row.implementation, "#f2a33a")


def _replace(path: pathlib.Path, write: Callable[[pathlib.Path], Any]) -> None:
    """Write beside the target and move it there, so that an interrupted run leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    part = pathlib.Path(name)
    try:
        write(part)
        part.chmod(0o644)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
