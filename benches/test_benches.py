"""`pytest benches`: the same cases under pytest-benchmark, one group a case. `-m "not slow"` takes the quick ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from onepass.benches import cli, harness, machine, timing

pytest.importorskip("pytest_benchmark", reason="pip install 'onepass[bench]'")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROUNDS = 20


def _pairs() -> Iterator[Any]:
    for stem in cli.stems():
        for case in cli.cases(stem, DEVICE):
            for name in case.implementations:
                marks = () if case.quick else (pytest.mark.slow,)
                yield pytest.param(case, name, id=f"{stem}-{case.name}-{name}", marks=marks)


@pytest.mark.parametrize(("case", "name"), _pairs())
def test_speed(benchmark: Any, case: harness.Case, name: str) -> None:
    arguments = harness.inputs(case, DEVICE)
    run = case.implementations[name]
    error, _, reason = harness.Verdict(case, arguments)(name, run(*timing.copied(arguments)))
    assert not reason, reason
    ring = timing.Ring(arguments, machine.pool_bytes(DEVICE))

    def turn() -> tuple[tuple, dict[str, Any]]:
        return ring.arguments(ring.take(1))[0], {}

    def timed(*arguments: Any) -> Any:
        result = run(*arguments)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        return result

    benchmark.group = f"{case.op} {case.name} {case.shape} {machine.name_of(case.dtype)}"
    benchmark.extra_info.update(bytes=case.reads + case.writes, flops=case.flops, error=error, formula=case.formula)
    benchmark.pedantic(timed, setup=turn, rounds=ROUNDS, warmup_rounds=2)
