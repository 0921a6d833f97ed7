"""One offline command for a machine with an NVIDIA GPU: build, test, sanitize, measure, and write JSON.

    python3 benches/gpu_check.py --out DIR        (or `make gpu-check OUT=DIR`)

It needs torch, pybind11, cmake, ninja, pytest, hypothesis, rich and matplotlib there and fetches nothing. Every part
runs in a process of its own with a time limit, and a failure never stops the next one: where the build fails, the
package is laid out without its extension, so that the peers are still measured. `--skip PART` leaves parts out;
`--resume` keeps what passed before in the same DIR at the same commit, where no file differs from it. All takes at
most `--minutes` together. DIR gets gpu_check.json (rewritten after every part), the log of each part and, from `onepass
bench`, bench.json and bench.png. A short table and one line sum up. Exit status: 0 every part passed, 1 some failed,
2 no GPU. `--device cpu` rehearses without one.
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
# Each part's share of the time; what one leaves over the later ones may use.
SHARES = {"build": 0.32, "info": 0.04, "tests": 0.24, "memcheck": 0.08, "racecheck": 0.08, "bench": 0.24}
# A few calls of every CUDA kernel, small enough for tools that make each of them a hundred times slower.
SANITIZED = "test_every_order_of_threads or test_noise_and_models or test_views_of_rows or test_offsets_that_the_host"


@dataclass
class Step:
    name: str
    command: list[str]
    limit: float = 0.0  # seconds
    status: str = "not run"  # passed, failed (N), timed out, skipped, no GPU, not installed, passed before
    seconds: float = 0.0
    last_line: str = ""

    @property
    def good(self) -> bool:
        return self.status in ("passed", "passed before", "skipped")

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


def architecture() -> str:
    """The one architecture to build for, as CMake takes it: that of the first device, with its own features."""
    code = "import torch; print(*torch.cuda.get_device_capability(0))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        return "native"
    major, minor = done.stdout.split()
    return f"{major}{minor}{'a' if int(major) in (9, 10) else ''}-real"


def sanitizer() -> str | None:
    """compute-sanitizer, of the toolkit or on PATH."""
    beside = pathlib.Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "compute-sanitizer"
    return str(beside) if beside.is_file() else shutil.which("compute-sanitizer")


def steps(device: str, site: pathlib.Path, out: pathlib.Path, cases: Sequence[str]) -> list[Step]:
    """What runs, in order."""
    python = sys.executable
    bench = [python, "-m", "onepass.benches", "--device", device, "--out", str(out), "--compile-seconds", "20",
             "--seconds", "0.2"]
    tests = [python, "-m", "pytest", "-m", "gpu", "-q", "--rootdir", str(ROOT), "-p", "no:cacheprovider"]
    # A fault of the kernel ends the tests with a status of its own.
    watched = [sanitizer() or "compute-sanitizer", "--error-exitcode", "99", "--target-processes", "all"]
    few = [*tests, str(ROOT / "tests" / "gpuless" / "cuda"), "-k", SANITIZED]
    commands = {
        "build": [python, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "--upgrade",
                  "--target", str(site), "-v", str(ROOT)],
        "info": [python, "-m", "onepass.cli", "info", "--json"],
        "tests": [*tests, str(ROOT / "tests")],
        "memcheck": [*watched, "--tool", "memcheck", *few],
        "racecheck": [*watched, "--tool", "racecheck", *few],
        "bench": [*bench, *cases],
    }
    return [Step(name, command) for name, command in commands.items()]


def limit_of(step: Step, plan: Sequence[Step], left_out: set[str], seconds: float) -> float:
    """A part's share of the seconds that are left, among the parts that are still to come."""
    ahead = [other.name for other in plan[plan.index(step):] if other.name not in left_out]
    return seconds * SHARES[step.name] / sum(SHARES[name] for name in ahead)


def commit() -> str:
    """The commit, with a mark where files differ from it; empty outside a repository."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def passed_before(out: pathlib.Path, device: str) -> set[str]:
    """The parts that an earlier run of the same commit on the same kind of device passed."""
    path = out / "gpu_check.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    known = found.get("commit", "")
    if not known or known.endswith("-dirty") or (known, found["device"]) != (commit(), device):
        return set()
    return {step["name"] for step in found["steps"] if step["status"] in ("passed", "passed before")}


def table(plan: Sequence[Step]) -> str:
    width = max(len(step.status) for step in plan)
    line = lambda step: f"{step.name:<10} {step.status:<{width}} {step.seconds:7.1f} s  {step.last_line[:90]}"
    return "\n".join(map(line, plan))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu_check.py", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("gpu_check_out"), metavar="DIR")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu rehearses the parts")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything together (default %(default)g)")
    parser.add_argument("--skip", action="append", default=[], choices=tuple(SHARES), metavar="PART",
                        help=f"leave out one of {', '.join(SHARES)}; may be repeated")
    parser.add_argument("--resume", action="store_true", help="keep what passed before in DIR at the same commit")
    parser.add_argument("--bench-arguments", default="", metavar="TEXT", help='passed on, as "reparam --quick"')
    options = parser.parse_args(argv)

    start = time.monotonic()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    done = passed_before(out, options.device) if options.resume else set()
    site = out / "site"
    if not (site / "onepass").exists():
        done.discard("build")
    if "bench" not in done:
        (out / "bench.json").unlink(missing_ok=True)  # an earlier run's figures must not pass for this one's
    plan = steps(options.device, site, out, options.bench_arguments.split())
    why = why_no_gpu() if options.device == "cuda" else None
    paths = [str(site), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    if why is None and options.device == "cuda":
        environment.setdefault("ONEPASS_CUDA_ARCHITECTURES", architecture())
    unwatched = {"memcheck", "racecheck"} if options.device == "cpu" or sanitizer() is None else set()
    left_out = done | unwatched | set(options.skip)
    about = {"device": options.device, "commit": commit(), "why": why}
    with tempfile.TemporaryDirectory(prefix="onepass-gpu-check-") as scratch:
        for step in plan:
            if step.name in options.skip:
                step.status = "skipped"
            elif why:
                step.status, step.last_line = "no GPU", why
            elif step.name in done:
                step.status = "passed before"
            elif step.name in unwatched:
                step.status, step.last_line = "skipped", "compute-sanitizer needs a GPU and its own installation"
            else:
                left = options.minutes * 60 - (time.monotonic() - start)
                step.limit = max(0.01, limit_of(step, plan, left_out, left))
                if step.name == "bench":        # ends by itself, and says which cases it left out
                    step.command += ["--within", f"{0.8 * step.limit:.0f}"]
                step.run(out, _for_part(step.name, environment), pathlib.Path(scratch))
                if step.name == "build" and step.status != "passed":
                    lay_out(site)
            _write(out / "gpu_check.json", {**about, "steps": [asdict(each) for each in plan], **_results(out)})
    print(table(plan))
    ran = [step for step in plan if step.status != "skipped"]
    good, states = sum(step.good for step in ran), ", ".join(f"{step.name} {step.status}" for step in plan)
    print(f"gpu-check: {good} of {len(ran)} parts passed on {options.device} ({states}); {out / 'gpu_check.json'}")
    return NO_GPU if why else 0 if good == len(ran) else 1


def _for_part(name: str, environment: dict[str, str]) -> dict[str, str]:
    """Memory that PyTorch keeps is inside bounds for memcheck: there each tensor is an allocation of its own."""
    return {**environment, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if name == "memcheck" else environment


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
