"""`onepass bench`: which cases, on which device, and where the results go."""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import importlib
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from . import machine, report
from .harness import Case, Row, Settings, measure


def stems() -> list[str]:
    """Every bench_<stem>.py beside this file."""
    return sorted(path.stem.removeprefix("bench_") for path in pathlib.Path(__file__).parent.glob("bench_*.py"))


def cases(stem: str, device: torch.device) -> list[Case]:
    """The cases of one stem; nothing is allocated yet."""
    return list(importlib.import_module(f".bench_{stem}", __package__).cases(device))


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="onepass bench", description=__doc__)
    p.add_argument("stems", nargs="*", metavar="STEM", help="files of cases to run (default: all; see --list)")
    p.add_argument("--only", action="append", default=[], metavar="CASE", help="case names or patterns (* and ?)")
    p.add_argument("--quick", action="store_true", help="the small cases, short timings, without torch.compile")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    p.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's)")
    p.add_argument("--seconds", type=float, metavar="S", help="timing for each implementation (default 1, quick 0.1)")
    p.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    p.add_argument("--compile-seconds", type=float, default=90.0, metavar="S", help="its time limit (default 90)")
    p.add_argument("--within", type=float, metavar="S", help="begin no case later than that; quick cases come first")
    p.add_argument("--out", "--json", type=pathlib.Path, default=pathlib.Path("bench_out"), metavar="DIR",
                   help="folder for bench.json and bench.png (default: %(default)s)")
    p.add_argument("--no-plot", action="store_true", help="write the JSON alone")
    p.add_argument("--list", action="store_true", help="print the cases and stop")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    p = parser()
    options = p.parse_args(argv)
    device = _device(p, options.device)
    if options.threads is not None:
        if options.threads < 1:
            p.error(f"--threads {options.threads}: expected at least 1")
        torch.set_num_threads(options.threads)
    chosen = _choose(p, options.stems, options.only, device)
    if options.list:
        for stem, case in chosen:
            print(f"{stem:<10} {case.name:<28} {case.op}  {case.shape}  {machine.name_of(case.dtype)}")
        return 0
    if options.quick and not options.only:
        chosen = [(stem, case) for stem, case in chosen if case.quick]
    if options.within is not None:
        chosen.sort(key=lambda pair: not pair[1].quick)
    begin = time.monotonic()
    if not options.no_plot:
        importlib.import_module("matplotlib")  # a missing extra is named now, not after minutes of timing
    console, status = Console(width=None if sys.stdout.isatty() else 80), Console(stderr=True)

    others = machine.OtherWork()
    with status.status("measuring this machine's bandwidth and matrix rate"), others:
        pool = machine.Pool(device)
        rates = machine.measure(pool, {case.dtype for _, case in chosen}, quick=options.quick)
    about = machine.describe(device) | {"other_work": others.processors()}
    report.print_header(console, about, machine.as_dict(rates))

    rows: list[Row] = []
    left_out: list[str] = []
    interrupted = False
    with _progress(status, len(chosen)) as (step, advance):
        try:
            for number, (stem, case) in enumerate(chosen):
                if options.within is not None and time.monotonic() - begin > options.within:
                    about["left_out"] = left_out = [case.name for _, case in chosen[number:]]
                    report.save_json(options.out / "bench.json", about, machine.as_dict(rates), rows)
                    break
                settings = Settings(
                    device=device,
                    seconds=options.seconds or (0.1 if options.quick else 1.0),
                    compile_seconds=0.0 if options.no_compile or options.quick else options.compile_seconds,
                    command=_command(stem, case, options),
                    on_step=step,
                    watch=others,
                    ceilings=pool if device.type == "cpu" else None,
                )
                rows += (found := measure(case, rates, settings))
                for key, group in report.grouped(found).items():
                    report.print_case(console, key, group)
                about["other_work"] = others.processors()
                report.save_json(options.out / "bench.json", about, machine.as_dict(rates), rows)
                advance()
        except KeyboardInterrupt:
            interrupted = True
    if left_out:
        console.print(f"\nleft out after {options.within:g} s: {', '.join(left_out)}", highlight=False)
    if rows:
        if told := machine.other_work(about):
            console.print(f"\n{told}", style="red")
        written = [options.out / "bench.json"]
        if not options.no_plot and any(row.median is not None for row in rows):
            report.save_plot(options.out / "bench.png", about, rows)
            written.append(options.out / "bench.png")
        console.print("\nwrote " + ", ".join(map(str, written)), highlight=False)
    return 130 if interrupted else int(any(row.ours and row.status != "ok" for row in rows))


def _device(p: argparse.ArgumentParser, name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        p.error(f"--device {name}: expected cpu or cuda")
    if device.type not in ("cpu", "cuda"):
        p.error(f"--device {name}: expected cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        p.error(f"--device {name}: torch {torch.__version__} sees no GPU here")
    return device


def _choose(
    p: argparse.ArgumentParser, wanted: list[str], only: list[str], device: torch.device
) -> list[tuple[str, Case]]:
    if unknown := [stem for stem in wanted if stem not in stems()]:
        p.error(f"no benchmarks named {', '.join(unknown)}: there are {', '.join(stems())}")
    found = [(stem, case) for stem in (wanted or stems()) for case in cases(stem, device)]
    patterns = [part for text in only for part in text.split(",")]
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(case.name, pattern) for _, case in found):
            p.error(f"--only {pattern}: there are {', '.join(case.name for _, case in found)}")
    return [(s, c) for s, c in found if not patterns or any(fnmatch.fnmatchcase(c.name, x) for x in patterns)]


def _command(stem: str, case: Case, options: argparse.Namespace) -> str:
    words = ["onepass", "bench", stem, "--only", case.name]
    words += ["--device", options.device] if options.device != "cpu" else []
    words += ["--threads", str(options.threads)] if options.threads is not None else []
    return " ".join(words)


@contextlib.contextmanager
def _progress(console: Console, total: int) -> Iterator[tuple[Callable[[str], None], Callable[[], None]]]:
    columns = (BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=total)
        yield (lambda text: progress.update(task, description=text)), (lambda: progress.advance(task))
