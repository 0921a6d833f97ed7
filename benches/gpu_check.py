"""One offline command for a machine with an NVIDIA GPU: build, test, measure, and write JSON.

    python3 benches/gpu_check.py --out DIR        (or `make gpu-check OUT=DIR`)

It needs torch, pybind11, cmake, ninja, pytest, rich and matplotlib there and fetches nothing. Every step runs in a
process of its own with a time limit, and a failure never stops the next one: where the build fails, the package is
laid out without its extension, so that the peers are still measured. DIR gets gpu_check.json, the log of each step and,
from `onepass bench`, bench.json and bench.png. The last line sums up. Exit status: 0 all steps passed, 1 some failed,
2 no GPU (with one line that says so). `--device cpu` rehearses every step without one.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
FOLDERS = {"": "engine", "kernels": "kernels", "benches": "benches"}
NO_GPU = 2


@dataclass
class Step:
    name: str
    command: list[str]
    limit: float  # seconds
    status: str = "not run"  # passed, failed, timed out
    seconds: float = 0.0
    last_line: str = ""

    def run(self, out: pathlib.Path, environment: dict[str, str], cwd: pathlib.Path) -> None:
        log, start = out / f"{self.name}.log", time.monotonic()
        print(f"gpu-check: {self.name} (at most {self.limit:.0f} s)", flush=True)
        with log.open("w") as stream:
            stream.write(f"$ {' '.join(self.command)}\n")
            stream.flush()
            process = subprocess.Popen(
                self.command, stdout=stream, stderr=subprocess.STDOUT, env=environment, cwd=cwd, start_new_session=True
            )
            try:
                status = process.wait(self.limit)
                self.status = "passed" if status == 0 else f"failed ({status})"
            except subprocess.TimeoutExpired:
                self.status = "timed out"
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)  # with the compilers it started
                    process.wait()
        self.seconds = round(time.monotonic() - start, 1)
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        self.last_line = lines[-1].strip() if lines else ""
        print(f"gpu-check: {self.name} {self.status} in {self.seconds} s: {self.last_line[:160]}", flush=True)


def why_no_gpu() -> str | None:
    """None where torch sees a GPU, else the reason in one line."""
    code = (
        "import torch; a = torch.cuda.is_available(); "
        "print('' if a else f'torch {torch.__version__} sees no GPU (built for CUDA {torch.version.cuda})')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        return f"torch cannot be imported by {sys.executable}: {(done.stderr.strip().splitlines() or ['?'])[-1]}"
    return done.stdout.strip() or None


def lay_out(site: pathlib.Path) -> None:
    """The package without its extension: what remains usable when nothing could be built."""
    for name, folder in FOLDERS.items():
        without = shutil.ignore_patterns("_C*.so", "__pycache__")
        shutil.copytree(ROOT / folder, site / "onepass" / name, dirs_exist_ok=True, ignore=without)


def steps(device: str, site: pathlib.Path, out: pathlib.Path, minutes: float, cases: Sequence[str]) -> list[Step]:
    """What runs, sharing the time: a quarter to build, a quarter to test, the rest to measure."""
    python, total = sys.executable, minutes * 60
    bench = [python, "-m", "onepass.benches", "--device", device, "--out", str(out), "--compile-seconds", "60"]
    return [
        Step("build", [python, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "--upgrade",
                       "--target", str(site), "-v", str(ROOT)], total / 4),
        Step("info", [python, "-m", "onepass.cli", "info", "--json"], 60),
        Step("tests", [python, "-m", "pytest", "-m", "gpu", "-q", "--rootdir", str(ROOT), "-p", "no:cacheprovider",
                       str(ROOT / "tests")], total / 4),
        Step("bench", [*bench, *cases], total / 2),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu_check.py", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("gpu_check_out"), metavar="DIR")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu rehearses the steps")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything together (default %(default)g)")
    parser.add_argument("--skip", action="append", default=[], choices=("build", "info", "tests", "bench"))
    parser.add_argument("--bench-arguments", default="", metavar="TEXT", help='passed on, as "reparam --quick"')
    options = parser.parse_args(argv)
    if options.device == "cuda" and (why := why_no_gpu()):
        print(f"gpu-check: nothing was run: {why}")
        return NO_GPU

    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    (out / "bench.json").unlink(missing_ok=True)  # an earlier run's figures must not pass for this one's
    with tempfile.TemporaryDirectory(prefix="onepass-gpu-check-") as scratch:
        site = pathlib.Path(scratch) / "site"
        paths = [str(site), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        plan = steps(options.device, site, out, options.minutes, options.bench_arguments.split())
        for step in plan:
            if step.name in options.skip:
                step.status = "skipped"
                continue
            step.run(out, environment, pathlib.Path(scratch))
            if step.name == "build" and step.status != "passed":
                lay_out(site)
    document = {"device": options.device, "steps": [asdict(step) for step in plan], **_results(out)}
    _write(out / "gpu_check.json", document)
    good = sum(step.status == "passed" for step in plan)
    ran = sum(step.status != "skipped" for step in plan)
    states = ", ".join(f"{step.name} {step.status}" for step in plan)
    print(f"gpu-check: {good} of {ran} steps passed on {options.device} ({states}); {out / 'gpu_check.json'}")
    return 0 if good == ran else 1


def _results(out: pathlib.Path) -> dict[str, Any]:
    """What the measurements wrote, if they came that far."""
    path = out / "bench.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _write(path: pathlib.Path, document: dict[str, Any]) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(document, indent=1) + "\n")
    part.replace(path)


if __name__ == "__main__":
    sys.exit(main())
