"""The kernel report says what changed and which limit is broken."""
from __future__ import annotations

import json

from gpuless import report

ROW = {
    "stem": "rng", "kernel": "fill_rows", "configuration": "fp32 BLOCKS=256 warps=4", "target": "sm_90",
    "compiler": "triton 9.9", "threads": 128, "registers": 32, "spill_bytes": 0, "instructions": 400, "load": 2,
    "store": 2, "wide_store": 2, "occupancy": 1.0,
}


def test_limits_are_enforced():
    assert report.broken([ROW]) == []
    spilling, narrow = {**ROW, "spill_bytes": 8}, {**ROW, "wide_store": 0}
    assert "spill_bytes is 8, the limit is 0 to 0" in report.broken([spilling])[0]
    assert "wide_store is 0, the limit is 2 to any" in report.broken([narrow])[0]
    wide = {**spilling, "kernel": "attend", "configuration": "bf16 BD=256 BM=64", "target": "gfx942"}
    assert report.broken([wide]) == []                                  # a later limit stands for an earlier one
    assert report.broken([{**wide, "spill_bytes": 40}]) and report.broken([{**wide, "target": "sm_90"}])


def test_differences_are_named():
    slower, other = {**ROW, "registers": 64, "barrier": 1}, {**ROW, "kernel": "another"}
    assert report.differences([ROW], [ROW]) == []
    assert report.differences([ROW], [slower]) == [
        "rng | fill_rows | fp32 BLOCKS=256 warps=4 | sm_90 | triton 9.9: barrier 0 -> 1, registers 32 -> 64"
    ]
    assert [line.rpartition(": ")[2] for line in report.differences([ROW], [other])] == ["new", "gone"]
    assert report.differences([ROW, {**ROW, "compiler": "nvcc"}], [ROW]) == []      # nvcc was not run
    elsewhere, newer = {**ROW, "target": "sm_80"}, {**ROW, "target": "sm_80", "compiler": "triton 10.0"}
    assert report.differences([ROW, elsewhere, newer], [ROW, newer]) == []          # left to the newer Triton
    assert [line.rpartition(": ")[2] for line in report.differences([ROW, elsewhere], [ROW])] == ["gone"]


def test_writing_keeps_the_other_compilers_and_checking_finds_a_change(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "BASELINE", tmp_path / "kernels.json")
    monkeypatch.setattr(report, "PAGE", tmp_path / "kernels.md")
    for name, rows in (("a", [ROW]), ("b", [{**ROW, "compiler": "nvcc"}]), ("c", [{**ROW, "registers": 40}])):
        (tmp_path / name).write_text(json.dumps(rows))
    files = {name: str(tmp_path / name) for name in "abc"}
    assert report.main(["write", files["a"]]) == 0 and report.main(["write", files["b"]]) == 0
    assert report.main(["check", files["a"], files["b"]]) == 0
    assert report.main(["check", files["c"]]) == 1
    assert "registers 32 -> 40" in capsys.readouterr().out
    assert "| `fill_rows` | triton 9.9 | sm_90 | 1 | 100% | 32 | 0 | 400 |" in report.PAGE.read_text()


def test_the_page_gives_the_range_over_configurations():
    more = {**ROW, "configuration": "bf16", "registers": 40, "occupancy": 0.75, "dynamic_shared": 512, "shared": 8}
    line = report.page([{**ROW, "compiler": "triton 9.8", "load": 9}, ROW, more]).splitlines()[-1]
    assert line.startswith("| `fill_rows` | triton 9.9 | sm_90 | 2 | 75 to 100% | 32 to 40 | 0 to 520 | 400 | 0 | 2 |")
    both = report.page([ROW, {**ROW, "compiler": "nvcc 13.0"}])
    assert "| `fill_rows` | nvcc 13.0 | sm_90 |" in both and "| `fill_rows` | triton 9.9 | sm_90 |" in both



def test_the_page_is_made_from_the_rows():
    rows = json.loads(report.BASELINE.read_text())
    assert report.PAGE.read_text() == report.page(rows)
    assert report.broken(rows) == []
