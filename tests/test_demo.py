"""The demo at its smallest: both sides agree, the report holds its pictures, and an interrupted run leaves nothing."""
from __future__ import annotations

import dataclasses
import html
import math
import pathlib
import re

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("safetensors")
pytest.importorskip("sklearn")
pytest.importorskip("diffusers")
pytest.importorskip("PIL")

from onepass import demo
from onepass.demo import bpe, checkpoints, report, workload
from onepass.demo.workload import Bar, Figure, Result, Side, Time

CPU = torch.device("cpu")
RESULTS: dict[str, Result] = {}


@pytest.fixture(autouse=True)
def one_thread():
    """At these sizes threads only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def quick_result(name: str) -> Result:
    if name not in RESULTS:
        RESULTS[name] = demo.run([name], CPU, demo.rich.console.Console(quiet=True), quick=True)[0]
    return RESULTS[name]


@pytest.mark.parametrize("name", demo.WORKLOADS)
def test_both_sides_agree(name):
    result = quick_result(name)
    assert result.agrees, (result.agreement, result.notes)
    assert result.name == name
    for side in (result.stock, result.onepass):
        assert 0 < side.op.seconds < side.whole.seconds


@pytest.mark.parametrize("name", demo.WORKLOADS)
def test_report_holds_the_figures(name):
    result = quick_result(name)
    assert result.figures
    text = report.page([result], "a machine")
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    assert len(pictures) == sum(isinstance(figure.content, bytes) for figure in result.figures)
    assert all(html.escape(figure.title) in text for figure in result.figures)
    assert "http" not in text   # one file, nothing fetched


def side(whole: float, op: float, margin: float = 0.01) -> Side:
    return Side(Time(whole, margin), Time(op, margin))


def made_up(**changes: object) -> Result:
    result = Result("vae", "this and that", "some_op", side(2.0, 0.5), side(1.6, 0.1), True, "within 1e-06",
                    figures=[Figure("Text", "words", "a < b")])
    return dataclasses.replace(result, **changes)


def test_table_fits_80_columns_and_shows_losses(capsys):
    slower = made_up(name="diffusion", op="attention_with_kvcache", stock=side(1.0, 0.2), onepass=side(1.1, 0.3),
                     agreement="16384 tokens equal")
    demo.rich.console.Console(width=80).print(report.table([made_up(), slower]))
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    for cell in ("1.25x", "5.00x", "25.0%", "0.91x", "0.67x", "attention_with_kvcache", "16384 tokens equal"):
        assert cell in text


def test_text_in_the_report_is_escaped():
    assert "a &lt; b" in report.page([made_up()], "m")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(12.34, "12.3 s"), (1.0, "1.00 s"), (0.4519, "452 ms"), (0.0123, "12.3 ms"), (45e-6, "45.0 us"), (123.4, "123 s")],
)
def test_seconds_text(seconds, text):
    assert report.seconds_text(seconds) == text


def test_ratios_within_the_noise_are_marked():
    assert report.ratio_text(Time(1.1, 0.05), Time(1.0, 0.04)) == ("1.10x", "win")
    assert report.ratio_text(Time(1.0, 0.04), Time(1.1, 0.05)) == ("0.91x", "loss")
    assert report.ratio_text(Time(1.1, 0.09), Time(1.0, 0.06)) == ("~1.10x", "")


def test_times():
    time = Time.of([1.0, 2.0, 3.0, 4.0, 5.0])
    assert time.seconds == 3.0
    assert time.margin == pytest.approx(2.5 * 2.4 / 1.68 / 5**0.5)
    assert Time.of([2.0]) == Time(2.0, math.inf)
    assert Time(1.0, 3.0) + Time(2.0, 4.0) == Time(3.0, 5.0)
    assert Time(1.0, 3.0) * 4 == Time(4.0, 12.0)


def test_unknown_name_lists_what_there_is(tmp_path, capsys):
    assert demo.main(["vae", "nosuch"], "cpu", tmp_path) == 2
    message = capsys.readouterr().err
    assert "'nosuch'" in message
    assert all(name in message for name in demo.WORKLOADS)
    assert not list(tmp_path.iterdir())


def test_unknown_device(tmp_path, capsys):
    assert demo.main(None, "nodevice", tmp_path) == 2
    assert "nodevice" in capsys.readouterr().err


def test_main_writes_the_report_or_says_what_differs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "run", lambda *_: [made_up()])
    assert demo.main(None, "cpu", tmp_path / "a" / "b") == 0
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["report.html"]
    monkeypatch.setattr(demo, "run", lambda *_: [made_up(agrees=False)])
    assert demo.main(None, "cpu", tmp_path) == 1
    assert "do not agree: vae" in capsys.readouterr().err


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_interrupted_workload_keeps_the_old_report(tmp_path, monkeypatch, capsys):
    old = tmp_path / "report.html"
    old.write_text("old")
    monkeypatch.setattr(demo, "run", interrupt)
    assert demo.main(None, "cpu", tmp_path) == 130
    assert capsys.readouterr().err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert old.read_text() == "old"


def test_interrupted_writing_leaves_no_partial_file(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "run", lambda *_: [made_up()])
    monkeypatch.setattr(report.os, "replace", interrupt)
    assert demo.main(None, "cpu", tmp_path) == 130
    assert not list(tmp_path.iterdir())


def test_race_alternates_and_takes_medians():
    order: list[str] = []

    def side(name):
        def work(op):
            order.append(name)
            with op:
                pass
            return name
        return work

    stock, onepass, stock_side, onepass_side = workload.race(side("s"), side("o"), CPU, Bar(), repeats=3)
    assert (stock, onepass) == ("s", "o")
    assert "".join(order) == "so" + "so" + "os" + "so"
    assert stock_side.op.seconds <= stock_side.whole.seconds
    assert onepass_side.op.seconds <= onepass_side.whole.seconds


def test_race_repeats_a_slow_workload_less_often(monkeypatch):
    monkeypatch.setattr(workload, "BUDGET", 0.0)
    runs: list[int] = []
    workload.race(lambda op: runs.append(0), lambda op: runs.append(1), CPU, Bar(), repeats=9)
    assert runs == [0, 1, 0, 1]


def test_tokenizer_round_trip():
    text = "the theme of the thesis: «then» x = 3.14\n\n    def the(): ...\n"
    merges = bpe.learn(text, 270)
    tokenizer = bpe.Tokenizer(merges)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert len(ids) < len(text.encode())
    assert tokenizer.decode(tokenizer.encode("never seen: ß")) == "never seen: ß"


def test_shipped_weights_are_small():
    files = list(checkpoints.FOLDER.glob("*.safetensors"))
    assert {path.stem for path in files} == {"diffusion", "lm", "vae"}
    assert sum(path.stat().st_size for path in files) < 5e6


def test_weights_round_trip(tmp_path: pathlib.Path):
    model = torch.nn.Linear(3, 2)
    checkpoints.save(model, "toy", tmp_path, config={"width": 3})
    state, metadata = checkpoints.load("toy", tmp_path)
    assert torch.equal(state["weight"], model.weight.half().float())
    assert metadata == {"config": {"width": 3}}
    assert [path.name for path in tmp_path.iterdir()] == ["toy.safetensors"]
