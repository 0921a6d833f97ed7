"""The benchmark harness: what it refuses to time, what it counts, what it writes. Times are not asserted."""
from __future__ import annotations

import dataclasses
import functools
import io
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

from onepass import _native
from onepass.benches import cli, harness, machine, main, performance, predict, report, timing

CPU = torch.device("cpu")
RATES = machine.Rates(read=30e9, copy=20e9, matmul={"float32": 100e9, "bfloat16": 200e9}, winners={})
FAST = harness.Settings(device=CPU, seconds=0.001, compile_seconds=0, pool=1 << 16)


def double(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


def case(**changes: object) -> harness.Case:
    plain = harness.Case(
        op="double", name="double_fp32", shape="1000", dtype=torch.float32, make=lambda device: (torch.randn(1000),),
        implementations={"onepass": double, "eager": double}, reference=double, reads=4000, writes=4000, formula="2 N",
    )
    return dataclasses.replace(plain, **changes)  # type: ignore[arg-type]


def rows_of(**changes: object) -> dict[str, harness.Row]:
    return {row.implementation: row for row in harness.measure(case(**changes), RATES, FAST)}


def test_a_wrong_result_is_not_timed_and_says_why() -> None:
    rows = rows_of(implementations={"onepass": lambda x: 2 * x + 1e-5, "eager": double})
    assert rows["onepass"].status == "failed"
    assert rows["onepass"].median is None
    assert "is allowed" in rows["onepass"].reason
    assert rows["eager"].median is not None


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (lambda x: 2 * x[:-1], "shape"),
        (lambda x: (2 * x, x), "2 outputs"),
        (lambda x: torch.full_like(x, float("nan")), "inf"),
        (lambda x: x.nosuch, "nosuch"),
    ],
)
def test_broken_implementations_become_rows(wrong: object, reason: str) -> None:
    row = rows_of(implementations={"onepass": wrong, "eager": double})["onepass"]
    assert row.status in ("failed", "skipped")
    assert reason in row.reason
    assert row.median is None


def test_other_peoples_rounding_has_more_room_than_ours() -> None:
    off = lambda x: 2 * x + 1e-6  # under PEERS ulp of the largest value, over one
    rows = rows_of(implementations={"onepass": off, "peer": off, "eager": double})
    assert rows["onepass"].status == "failed"
    assert rows["peer"].status == "ok"


def test_different_numbers_by_design_are_not_compared() -> None:
    rows = rows_of(
        implementations={"onepass": double, "eager": torch.rand_like}, uncompared=frozenset({"eager"}), yardstick=double
    )
    assert rows["eager"].median is not None
    assert rows["eager"].error is None


def test_a_wrong_yardstick_stops_the_case() -> None:
    with pytest.raises(ValueError, match="PyTorch itself is off"):
        rows_of(yardstick=lambda x: 3 * x)


def test_rows_say_what_they_cost() -> None:
    row = rows_of(flops=10)["onepass"]
    assert row.median is not None
    assert row.p20 is not None
    assert row.p80 is not None
    assert row.p20 <= row.median <= row.p80
    assert row.n >= timing.ROUNDS[0]
    assert (row.bytes, row.bound) == (8000, "memory")
    assert row.of_bound == pytest.approx(8000 / 20e9 / row.median)
    assert row.speedup is not None
    assert row.lead is not None


def test_the_rate_that_binds() -> None:
    assert RATES.bound(1000, 10, 0, torch.float32) == ("memory", pytest.approx(1010 / 30e9))
    assert RATES.bound(1000, 1000, 0, torch.float32) == ("memory", pytest.approx(2000 / 20e9))
    assert RATES.bound(1000, 0, 10**9, torch.bfloat16) == ("matmul", pytest.approx(10**9 / 200e9))


def test_gradients_and_arguments_written_in_place() -> None:
    def append(cache: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return cache.add_(x)

    rows = rows_of(
        make=lambda device: (torch.zeros(1000), torch.randn(1000)),
        implementations={"onepass": append, "eager": append}, reference=append,
    )
    assert rows["onepass"].error == 0

    def slope(x: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(x.square().sum(), x)[0]

    rows = rows_of(
        make=lambda device: (torch.randn(1000, requires_grad=True),),
        implementations={"onepass": slope, "eager": slope}, reference=slope,
    )
    assert rows["onepass"].status == "ok"


def test_arguments_rotate_and_results_are_kept() -> None:
    ring = timing.Ring((torch.zeros(1024),), 1 << 16)
    assert len(ring.sets) == 16
    assert len({s[0].data_ptr() for s in ring.sets}) == 16
    assert not ring.cache_resident
    places = ring.take(20)
    assert [p % 16 for p in places][:2] == [0, 1]
    ring.keep(places, list(range(20)))
    assert ring.kept[:4] == [16, 17, 18, 19]
    assert ring.take(1).start == 4
    assert timing.Ring((torch.zeros(1),), 1 << 30).cache_resident


def test_everybody_gets_the_same_number_of_rounds_in_turn() -> None:
    seen: list[str] = []
    runs = {name: functools.partial(lambda name, x: seen.append(name), name) for name in "abc"}
    times = timing.interleaved(runs, timing.Ring((torch.zeros(8),), 1 << 10), CPU, 0.001)
    assert len({len(t.samples) for t in times.values()}) == 1


def test_compiling_has_a_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow_compile(*args: object, **options: object) -> object:
        return lambda *args: time.sleep(30)

    monkeypatch.setattr(torch, "compile", slow_compile)
    start = time.perf_counter()
    rows = harness.measure(case(), RATES, dataclasses.replace(FAST, compile_seconds=0.2))
    assert time.perf_counter() - start < 10
    row = next(row for row in rows if row.implementation == harness.COMPILED)
    assert row.status == "skipped"
    assert "took over 0.2 s" in row.reason


@pytest.mark.skipif(_native.error is not None, reason="no native extension")
@pytest.mark.parametrize(("size", "offset"), [(0, 0), (4, 1), (4000, 3), (1 << 20, 1)])
def test_native_copy_and_read(size: int, offset: int) -> None:
    source = torch.randint(-(2**31), 2**31, (size // 4 + 16,), dtype=torch.int32)
    target = torch.zeros(size + 64, dtype=torch.uint8)
    _native._C.copy_bytes(source.data_ptr(), target.data_ptr() + offset, size, 2)
    assert torch.equal(target[offset : offset + size], source.view(torch.uint8)[:size])
    assert not target[:offset].any()
    assert not target[offset + size :].any()
    expected = functools.reduce(lambda a, b: a ^ b, source[: size // 4].tolist(), 0) & 0xFFFFFFFF
    assert _native._C.read_bytes(source.data_ptr(), size, 2) == expected


def test_other_work_leaves_our_own_out() -> None:
    """Three seconds in which half of the work was ours, then one in which all of it was."""
    ticks = iter([(10.0, 100.0, 50.0), (13.0, 112.0, 56.0), (20.0, 500.0, 60.0), (21.0, 504.0, 64.0)])
    others = machine.OtherWork(lambda: next(ticks))
    assert others.processors() is None
    with others:
        pass
    assert others.processors() == 2.0
    with others:
        pass
    assert others.processors() == 1.5
    assert "1.5 processors" in machine.other_work({"other_work": others.processors()})
    assert machine.other_work({"other_work": 0.05}) == machine.other_work({"other_work": None}) == ""

    silent = machine.OtherWork(lambda: None)
    with silent:
        pass
    assert silent.processors() is None


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="the system does not say")
def test_other_work_is_seen_as_it_runs() -> None:
    burn = "import time; end = time.monotonic() + 60\nwhile time.monotonic() < end: pass"
    others = machine.OtherWork()
    with subprocess.Popen([sys.executable, "-c", burn]) as process:
        try:
            with others:
                time.sleep(1.0)
        finally:
            process.kill()
    found = others.processors()
    assert found is not None
    assert found > 0.2      # a whole processor, unless many more want it


def test_the_command_writes_a_table_json_and_a_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["rng", "--only", "normal_1m_fp32", "--quick", "--device", "cpu", "--seconds", "0.001"]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "onepass" in out
    assert "onepass bench rng --only normal_1m_fp32" in out
    assert max(len(line) for line in out.splitlines()) <= 80
    about, rates, rows = report.load_json(tmp_path / "bench.json")
    assert about["versions"]["torch"]
    assert about["commit"]
    assert about["other_work"] is None or about["other_work"] >= 0
    assert rates["read"] > 0
    assert {row.implementation: row.backend for row in rows} == {
        "onepass": "reference" if _native.error else "cpu", "eager": ""
    }
    assert (tmp_path / "bench.png").stat().st_size > 10_000
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bench.json", "bench.png"]
    json.loads((tmp_path / "bench.json").read_text())


def test_what_does_not_fit_the_time_is_left_out_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["rng", "--only", "normal_1m_*", "--quick", "--device", "cpu", "--seconds", "0.001", "--no-plot"]
    assert main([*arguments, "--within", "0", "--out", str(tmp_path)]) == 0
    assert "left out after 0 s: normal_1m_fp32, normal_1m_bf16" in capsys.readouterr().out
    about, _, rows = report.load_json(tmp_path / "bench.json")
    assert about["left_out"] == ["normal_1m_fp32", "normal_1m_bf16"] and rows == []


def test_unknown_names_list_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, known in ((["nosuch"], "reparam"), (["rng", "--only", "nosuch"], "normal_1m_fp32")):
        with pytest.raises(SystemExit) as stopped:
            main([*arguments, "--device", "cpu"])
        assert stopped.value.code == 2
        assert known in capsys.readouterr().err


def test_every_case_is_well_formed() -> None:
    for stem in cli.stems():
        cases = cli.cases(stem, CPU)
        assert cases, stem
        assert len({c.name for c in cases}) == len(cases), stem
        for c in cases:
            assert "eager" in c.implementations, c.name
            assert any(name.startswith("onepass") for name in c.implementations), c.name
            assert c.reads + c.writes > 0, c.name
            assert c.formula, c.name


def test_what_every_case_launches_on_a_gpu_is_recorded() -> None:
    recorded = {(row["stem"], row["case"]) for row in json.loads(predict.LAUNCHES.read_text())}
    stems = {stem for stem, _ in recorded}
    assert recorded == {(stem, c.name) for stem in stems for c in cli.cases(stem, CPU)}, "make kernel-report"


def test_listing_allocates_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list", "--device", "cpu"]) == 0
    assert "z_kl_b64_fp32" in capsys.readouterr().out


def test_the_performance_page_is_made_from_the_results() -> None:
    root = Path(__file__).parent.parent
    committed = performance.page(root / "benches" / "results")
    assert (root / "docs" / "performance.md").read_text() == committed, "make docs"


def test_without_results_the_page_lists_every_case_as_unmeasured(tmp_path: Path) -> None:
    text = performance.page(tmp_path)
    for stem in cli.stems():
        section = text.partition(f"## {stem}\n")[2].partition("\n## ")[0]
        rows = {cells[1]: cells for line in section.splitlines() if len(cells := line.split(" | ")) == 10}
        for c in cli.cases(stem, CPU):
            assert f"| {c.name} | {c.shape} | {machine.name_of(c.dtype)} | NVIDIA H200 |" in section, c.name
        measured = [cells[5:8] for cells in rows.values()][1:]
        assert set(map(tuple, measured)) <= {("unmeasured", "unmeasured", "")}


@pytest.fixture(scope="module")
def pool() -> machine.Pool:
    return machine.Pool(CPU)


@pytest.mark.parametrize(
    ("work", "bound", "scale"),
    [
        ({"reads": 1 << 20, "writes": 0}, "memory", 1),
        ({"reads": 1 << 20, "writes": 1 << 20}, "memory", 1),
        ({"reads": 8 * machine.pool_bytes(CPU), "writes": 0}, "memory", 8),     # less is read, and scaled
        ({"reads": 1, "writes": 1, "flops": 1 << 28}, "matmul", 2**-3),
        ({"reads": 1, "writes": 1, "flops": 1 << 20}, "matmul", 2**-11),
    ],
)
def test_the_binding_rate_takes_its_turn(pool: machine.Pool, work: dict[str, int], bound: str, scale: float) -> None:
    ceiling = machine.Ceiling(pool, RATES, **{"flops": 0, **work}, dtype=torch.float32)
    assert ceiling.scale == pytest.approx(scale, rel=0.05)
    for _ in range(3):
        ceiling()
    rows = harness.measure(case(**work), RATES, dataclasses.replace(FAST, ceilings=pool, pool=0))
    for row in rows:
        assert row.bound == bound
        assert row.ceiling is not None and row.ceiling > 0
        assert row.of_bound == pytest.approx(row.ceiling / row.median)      # the pool of 0 bytes is never in the cache
    text = io.StringIO()
    for key, group in report.grouped(rows).items():
        report.print_case(Console(file=text, width=80), key, group)
    assert "in the same rounds: " + report.duration(rows[0].ceiling) in text.getvalue()


def test_a_measurement_stands_beside_its_prediction(tmp_path: Path) -> None:
    c = next(c for c in cli.cases("rng", CPU) if c.name == "normal_1m_fp32")
    rates = {"read": 1e10, "copy": 4e9, "matmul": {"float32": 1e11}, "winners": {}}
    about = {
        "cpu": "A", "gpu": "G", "isa": "", "threads": 1, "versions": {}, "commit": "abc", "date": "2030-01-02T03:04",
        "other_work": None,
    }
    for device, shape in (("cpu", c.shape), ("cuda", c.shape)):
        rows = [
            harness.Row(
                c.op, c.name, who, who, device, shape, "float32", median=median, p20=median, p80=median, n=9,
                command=f"onepass bench rng --only {c.name}",
            )
            for who, median in (("eager", 0.002), ("onepass", 0.004))
        ]
        report.save_json(tmp_path / f"{device}.json", about | {"device": device}, rates, rows)
    lines = [line for line in performance.page(tmp_path).splitlines() if line.startswith(f"| {c.name}")]
    end = "4 ms | eager, 2 ms | 0.50x **loses** | 2030-01-02 | abc |"
    assert lines == [
        f"| {c.name} | 1M | float32 | A, 1 thread | 1.05 ms, memory | {end}",
        f"| {c.name} | 1M | float32 | G | {report.duration(predict.on_gpu('rng', c)[1])}, issue | {end}",
    ]
    path = tmp_path / "cuda.json"           # of a shape that the case no longer has: nothing is predicted for it
    path.write_text(path.read_text().replace('"shape": "1M"', '"shape": "2M"'))
    assert f"| {c.name} | 2M | float32 | G | - | {end}\n" in performance.page(tmp_path)
    assert f"| {c.name} | 1M | float32 | NVIDIA H200 |" in performance.page(tmp_path)


def test_issue_slots_of_the_busiest_multiprocessor() -> None:
    gpu = dataclasses.replace(predict.H200, multiprocessors=10, clock=1e9, slots=4)
    launches = [{"programs": 21, "warps": 2, "instructions": 400}, {"programs": 1, "warps": 1, "instructions": 40}]
    assert predict.issue(launches, gpu) == pytest.approx((3 * 2 * 400 / 4 + 40 / 4) * 1e-9)
    large = next(c for c in cli.cases("rng", CPU) if c.name == "normal_16m_fp32")
    bound, seconds = predict.on_gpu("rng", large)
    assert bound == "issue" and seconds > large.writes / predict.H200.rates.copy
