"""Four generative workloads end to end, stock against onepass: `onepass demo`, `make demo`.

A workload is a module with `run(device, bar, quick) -> Result`. Weights are shipped; examples/train_*.py remakes them.
"""
from __future__ import annotations

import importlib
import importlib.util
import os
import pathlib
import platform
import sys
import time

import rich.console
import rich.progress
import torch

from . import report
from .workload import Bar, Result

# Imported where they are used, missed here: the command line then names the extra before anything has run.
for _name in ("diffusers", "PIL", "safetensors", "sklearn"):
    if importlib.util.find_spec(_name) is None:
        raise ModuleNotFoundError(f"No module named {_name!r}", name=_name)

WORKLOADS = {
    "lm": "text from a small transformer with a KV cache, greedy and sampled",
    "diffusion": "digits denoised with classifier-free guidance, against diffusers' own schedulers",
    "vae": "digits encoded, drawn and decoded by a variational autoencoder",
    "nerf": "a radiance field trained on a small scene, then rendered around a turntable",
}


class _ProgressBar(Bar):
    """A workload's line in rich's progress display."""

    def __init__(self, progress: rich.progress.Progress, name: str) -> None:
        self._progress = progress
        self._task = progress.add_task(name, total=None)

    def start(self, total: int) -> None:
        self._progress.reset(self._task, total=total)

    def tick(self) -> None:
        self._progress.advance(self._task)

    def shorten(self, total: int) -> None:
        self._progress.update(self._task, total=total)


def run(names: list[str], device: torch.device, console: rich.console.Console, quick: bool = False) -> list[Result]:
    """The results of the workloads `names`, in that order."""
    results = []
    columns = (
        rich.progress.TextColumn("{task.description:<10}"), rich.progress.BarColumn(bar_width=30),
        rich.progress.TaskProgressColumn(), rich.progress.TimeElapsedColumn(),
    )
    # Four refreshes a second: drawing the bar takes time from what is measured.
    with rich.progress.Progress(*columns, console=console, refresh_per_second=4) as progress:
        for name in names:
            bar = _ProgressBar(progress, name)
            results.append(importlib.import_module(f".{name}", __name__).run(device, bar, quick))
    return results


def _machine(device: torch.device) -> str:
    from .. import __version__

    where = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    threads = torch.get_num_threads()
    return (
        f"onepass {__version__}, PyTorch {torch.__version__}, Python {platform.python_version()}; {where}, "
        f"{threads} thread{'s' if threads > 1 else ''}; {time.strftime('%Y-%m-%d %H:%M')}"
    )


def _processor() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main(only: list[str] | None, device: str, out: pathlib.Path) -> int:
    """Run the workloads `only` (all by default), print the table, write `out`/report.html; returns the exit status.

    0: every pair of outputs agreed. 1: one did not. 2: a bad argument. 130: interrupted, and no report written.
    """
    unknown = [name for name in only or [] if name not in WORKLOADS]
    if unknown:
        print(f"onepass demo: no workload named {', '.join(map(repr, unknown))}; there are:", file=sys.stderr)
        for name, what in WORKLOADS.items():
            print(f"  {name:<10} {what}", file=sys.stderr)
        return 2
    try:
        where = torch.device(device)
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError) as error:
        print(f"onepass demo: --device {device} cannot be used: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    console = rich.console.Console()
    names = [name for name in WORKLOADS if not only or name in only]
    try:
        results = run(names, where, console)
        console.print(report.table(results))
        path = out / "report.html"
        report.write(report.page(results, _machine(where)), path)
    except KeyboardInterrupt:
        print("onepass demo: interrupted; no report was written", file=sys.stderr)
        return 130
    console.print("ratio: stock / onepass, ~ within the noise; share: the op's part of stock's time")
    console.print(f"report: {path}", soft_wrap=True)
    if wrong := [result.name for result in results if not result.agrees]:
        print(f"onepass demo: outputs do not agree: {', '.join(wrong)}", file=sys.stderr)
        return 1
    return 0
