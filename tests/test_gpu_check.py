"""`make gpu-check` without a GPU: what it says, a rehearsal on the CPU, every part with stand-ins for its tools."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benches" / "gpu_check.py"


def gpu_check(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_gpu_check_without_a_gpu_says_so_for_every_part(tmp_path: Path) -> None:
    done = gpu_check("--out", str(tmp_path), "--skip", "info")
    assert done.returncode == 2
    found = json.loads((tmp_path / "gpu_check.json").read_text())
    states = {step["name"]: step["status"] for step in found["steps"]}
    assert states.pop("info") == "skipped"
    assert states == dict.fromkeys(("build", "tests", "memcheck", "racecheck", "bench"), "no GPU")
    assert "sees no GPU" in found["why"]
    *table, summary = done.stdout.splitlines()
    assert len(table) == 6 and summary.startswith("gpu-check: 0 of 5 parts passed on cuda (build no GPU, info skipped")
    assert not (tmp_path / "site").exists()


def test_gpu_check_rehearsed_on_the_cpu_goes_on_after_a_failure(tmp_path: Path) -> None:
    few = "rng --only normal_1m_fp32 --quick --no-plot --seconds 0.001"
    skipped = ("--skip", "build", "--skip", "tests")
    done = gpu_check("--device", "cpu", "--out", str(tmp_path), *skipped, "--bench-arguments", few)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu_check.json").read_text())
    assert found["rates"]["copy"] > 0
    assert found["rows"]
    states = {step["name"]: step["status"] for step in found["steps"]}
    assert states["bench"] == states["info"] == "passed" and states["memcheck"] == states["tests"] == "skipped"

    done = gpu_check("--device", "cpu", "--out", str(tmp_path), *skipped, "--resume", "--bench-arguments", few)
    again = json.loads((tmp_path / "gpu_check.json").read_text())
    clean = found["commit"] and not found["commit"].endswith("-dirty")      # then what passed is kept
    assert {s["name"]: s["status"] for s in again["steps"]}["bench"] == ("passed before" if clean else "passed")
    assert done.returncode == 0 and again["rows"]

    done = gpu_check(
        "--device", "cpu", "--out", str(tmp_path), "--skip", "tests", "--minutes", "0.001", "--bench-arguments", few
    )
    assert done.returncode == 1
    found = json.loads((tmp_path / "gpu_check.json").read_text())
    assert {step["name"]: step["status"] for step in found["steps"]}["build"] == "timed out"
    assert "rows" not in found  # nothing of the first run
    assert done.stdout.splitlines()[-1].startswith("gpu-check: ")


# Stands in for Python on a machine with a GPU, and for compute-sanitizer: notes its call and does what each would.
STAND_IN = """#!{python}
import json, os, pathlib, sys
words = sys.argv[1:]
part = next((p for p in ("is_available", "get_device_capability", "pip", "onepass.cli", "pytest", "onepass.benches")
             if p in (words[1] if words[0] == "-c" else words)), "?")
tool = pathlib.Path(sys.argv[0]).name
with open({log!r}, "a") as log:
    names = ("PYTHONPATH", "ONEPASS_CUDA_ARCHITECTURES", "PYTORCH_NO_CUDA_MEMORY_CACHING")
    log.write(json.dumps([tool, part, words, {{k: os.environ.get(k, "") for k in names}}, os.getcwd()]) + "\\n")
value = lambda name: words[words.index(name) + 1]
if part == "get_device_capability":
    print("9 0")
if part == "pip":
    (pathlib.Path(value("--target")) / "onepass").mkdir(parents=True, exist_ok=True)
if part == "onepass.benches":
    document = dict(machine=dict(gpu="stand-in"), rates=dict(read=1.0), rows=[dict(case="a")])
    (pathlib.Path(value("--out")) / "bench.json").write_text(json.dumps(document))
if part not in ("is_available", "get_device_capability"):
    print(tool, part, "was here")
sys.exit({failing!r} in words and 99)
"""


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """gpu_check.py on a machine whose Python sees a GPU and whose compute-sanitizer fails in racecheck."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("python-stand-in", "compute-sanitizer"):
        text = STAND_IN.format(python=sys.executable, log=str(tmp_path / "log"), failing="racecheck")
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_check", module)       # dataclasses look their module up
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "executable", str(tools / "python-stand-in"))
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "no toolkit"))
    monkeypatch.delenv("ONEPASS_CUDA_ARCHITECTURES", raising=False)
    monkeypatch.setattr(module, "commit", lambda: "0123456789ab")
    return module


def calls(tmp_path: Path) -> dict[str, list]:
    """What ran, by (tool, part): the last call of each; compute-sanitizer by its --tool."""
    found = {}
    for line in (tmp_path / "log").read_text().splitlines():
        tool, part, words, environment, folder = json.loads(line)
        name = words[words.index("--tool") + 1] if tool == "compute-sanitizer" else part
        found[name] = [words, environment, folder]
    return found


def test_every_part_runs_with_stand_ins_for_its_tools(
    machine: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert machine.main(["--out", str(out), "--minutes", "2"]) == 1
    found = json.loads((out / "gpu_check.json").read_text())
    states = {step["name"]: step["status"] for step in found["steps"]}
    assert states.pop("racecheck") == "failed (99)"
    assert states == dict.fromkeys(("build", "info", "tests", "memcheck", "bench"), "passed")
    assert found["machine"] == {"gpu": "stand-in"} and found["rows"] == [{"case": "a"}] and found["why"] is None
    ran = calls(tmp_path)
    site = str(out / "site")
    for part in ("pip", "onepass.cli", "pytest", "memcheck", "racecheck", "onepass.benches"):
        words, environment, folder = ran[part]
        assert environment["PYTHONPATH"].split(os.pathsep)[0] == site, part
        assert environment["ONEPASS_CUDA_ARCHITECTURES"] == "90a-real"
        assert environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] == ("1" if part == "memcheck" else "")
        assert "gpu-check" in folder and not Path(folder).exists()      # nobody's folder, gone again
    assert ran["pip"][0][-1] == str(ROOT) and "--no-index" in ran["pip"][0]
    for part in ("memcheck", "racecheck"):
        words = ran[part][0]
        assert words[:2] == ["--error-exitcode", "99"] and words[words.index("-k") + 1] == machine.SANITIZED
        assert words[words.index(sys.executable) + 1 :][:2] == ["-m", "pytest"]
    bench = ran["onepass.benches"][0]
    assert bench[bench.index("--device") + 1] == "cuda" and 60 < float(bench[bench.index("--within") + 1]) <= 96
    *_, last = capsys.readouterr().out.splitlines()
    assert last.startswith("gpu-check: 5 of 6 parts passed on cuda (build passed, info passed, tests passed")


def test_what_passed_is_kept_and_what_failed_is_run_again(machine: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert machine.main(["--out", str(out)]) == 1
    (tmp_path / "log").unlink()
    assert machine.main(["--out", str(out), "--resume"]) == 1
    assert set(calls(tmp_path)) == {"is_available", "get_device_capability", "racecheck"}
    states = {step["name"]: step["status"] for step in json.loads((out / "gpu_check.json").read_text())["steps"]}
    assert states["build"] == states["bench"] == "passed before" and states["racecheck"] == "failed (99)"
    assert machine.main(["--out", str(out), "--resume", "--skip", "racecheck"]) == 0


def test_without_a_sanitizer_its_parts_are_skipped(
    machine: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "sanitizer", lambda: None)
    assert machine.main(["--out", str(tmp_path / "out")]) == 0
    assert not {"memcheck", "racecheck"} & set(calls(tmp_path))


def test_a_part_may_use_what_earlier_ones_left(machine: ModuleType) -> None:
    plan = [machine.Step(name, []) for name in machine.SHARES]
    of = {step.name: step for step in plan}
    assert machine.limit_of(of["build"], plan, set(), 540) == pytest.approx(540 * 0.32)
    assert machine.limit_of(of["bench"], plan, set(), 300) == 300       # the last has all that is left
    rest = machine.limit_of(of["tests"], plan, {"memcheck", "racecheck"}, 480)
    assert rest == pytest.approx(480 * 0.24 / (0.24 + 0.24))


def test_the_sanitizers_take_a_few_calls_of_every_kernel() -> None:
    chosen = SCRIPT.read_text().partition('SANITIZED = "')[2].partition('"')[0]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "gpu", "-k", chosen, "tests/gpuless/cuda"],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )
    for stem in ("attention", "denoise", "reparam", "volrend"):
        assert f"test_cuda_{stem}.py" in done.stdout, done.stdout + done.stderr
