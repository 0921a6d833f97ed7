"""The kernel report: what every kernel compiles to, for each configuration, architecture and compiler.

    report.py collect FILE [TARGET...]  with Triton importable: compiles every launch of triton/launches.py, for all
                                        targets or those named, and writes its rows
    report.py write FILE...             rows of Triton and CUDA to kernels.json beside this file and to docs/kernels.md
    report.py check FILE...             the same rows against kernels.json: fails on a difference and a broken limit

A row names its kernel, configuration, target and compiler; the rest is what `cubin.Kernel.record` gives, threads a
block, dynamic shared memory and theoretical occupancy. `make kernel-report` writes, CI checks.
"""
from __future__ import annotations

import collections
import json
import pathlib
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any

HERE = pathlib.Path(__file__).resolve().parent
BASELINE = HERE / "kernels.json"
PAGE = HERE.parents[1] / "docs" / "kernels.md"
KEY = ("stem", "kernel", "configuration", "target", "compiler")
Row = dict[str, Any]

# (kernel, configuration, target) as patterns, what is bounded, from which value to which; the last that fits counts.
LIMITS: list[tuple[str, str, str, str, int, int | None]] = [
    (".*", ".*", ".*", "spill_bytes", 0, 0),
    ("attend", ".* BD=256 .*", "gfx942", "spill_bytes", 0, 32),
    ("attend", ".*PRECISION=tf32x3.*", "sm_120", "spill_bytes", 0, 68),
    ("sample_backward_tiles", ".*no Noise.*", "sm_100", "spill_bytes", 0, 8),     # by Triton 3.6, refused there
    ("fill_rows", "fp32 .*BLOCKS=256.*", "sm_.*", "wide_store", 2, None),
    ("forward_tiles|backward_tiles", ".*UNIT=[48].*", "sm_.*", "wide_load", 2, None),
    ("forward_tiles|backward_tiles", ".*UNIT=[48].*", "sm_.*", "wide_store", 1, None),
    ("sample_tiles|sample_backward_tiles", ".*UNIT=[48].*", "sm_.*", "wide_load", 2, None),
    ("sample_tiles|sample_backward_tiles", ".*UNIT=[48].*", "sm_.*", "wide_store", 1, None),
    ("soften_tiles|soften_rows", ".*UNIT=[48].*", "sm_.*", "wide_load", 1, None),
    ("soften_rows", ".*UNIT=[48].*", "sm_.*", "wide_store", 1, None),
    ("soften_rows", ".* HARD=True.* T=[1-9].*", "sm_.*", "wide_load", 0, None),     # the tiles have said which it is
    ("sum_parts", ".*UNIT=[48].*", "sm_.*", "wide_load", 2, None),
    ("path_tiles", ".*UNIT=[48].*", "sm_.*", "wide_load", 1, None),
    ("path_tiles", ".*UNIT=[48].*", "sm_.*", "wide_store", 1, None),
    ("denoise_tiles", ".*", "sm_.*", "wide_load", 2, None),
    ("denoise_tiles", ".*", "sm_.*", "wide_store", 1, None),
    ("merge_parts", ".*UNIT=[48].*", "sm_.*", "wide_load", 2, None),
    ("merge_parts_backward", ".*UNIT=[48].*", "sm_.*", "wide_load", 3, None),
    ("merge_parts|merge_parts_backward", ".*UNIT=[48].*", "sm_.*", "wide_store", 1, None),
    # CUDA C++
    ("fill", ".*", "sm_.*", "wide_store", 1, None),
    ("fill", ".*", "sm_.*", "fma", 0, 12),      # square roots and an index: test_compiled.py looks at the rest
    ("sample", ".*", "sm_.*", "wide_load", 3, None),
    ("sample", ".*", "sm_.*", "wide_store", 1, None),
    ("sample_backward", ".*", "sm_.*", "wide_load", 4, None),
    ("sample_backward", ".*", "sm_.*", "wide_store", 3, None),
    ("posterior", "fp32, false.*", "sm_.*", "wide_load", 3, None),
    ("posterior", "fp32, true.*", "sm_.*", "wide_load", 5, None),
    ("posterior", "fp32.*", "sm_.*", "wide_store", 3, None),
    ("posterior_backward", "fp32, false.*", "sm_.*", "wide_load", 4, None),
    ("posterior_backward", "fp32, true.*", "sm_.*", "wide_load", 6, None),
    ("posterior_backward", "fp32, false.*", "sm_.*", "wide_store", 3, None),
    ("posterior_backward", "fp32, true.*", "sm_.*", "wide_store", 5, None),
    ("gumbel_kept", "fp32.*", "sm_.*", "wide_load", 2, None),
    ("gumbel_again", "fp32.*", "sm_.*", "wide_load", 4, None),
    ("gumbel_.*", "fp32.*", "sm_.*", "wide_store", 1, None),
    ("path_whole|path_tiles", "fp32, .*", "sm_.*", "wide_load", 2, None),
    ("path_whole|path_tiles", "fp32, .*", "sm_.*", "wide_store", 1, None),
    ("path_parts", "fp32", "sm_.*", "wide_load", 3, None),
    ("merge_parts", ".*, true", "sm_.*", "wide_load", 4, None),
    ("merge_parts", ".*, true", "sm_.*", "wide_store", 1, None),
    ("merge_parts_backward", ".*, true", "sm_.*", "wide_load", 5, None),
    ("merge_parts_backward", ".*, true", "sm_.*", "wide_store", 4, None),
    ("step", ".*", "sm_.*", "wide_load", 4, None),
    ("step", ".*", "sm_.*", "wide_store", 2, None),
    ("attend", ".*", "sm_.*", "async_load", 2, None),
    ("attend_tiles", ".*", "sm_.*", "matrix", 32, None),
    ("attend_tiles", ".*", "sm_.*", "async_load", 2, None),
    # of both: Triton's tiles on tensor cores, and its float32, which has none and copies nothing ahead
    ("attend", ".*PRECISION=tf32.*", "sm_.*", "matrix", 8, None),
    ("attend", ".*PRECISION=ieee.*", "sm_.*", "async_load", 0, None),
    ("attend", ".*PRECISION=ieee.*", "sm_.*", "wide_load", 8, None),
]


def _key(row: Row) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in KEY)


def _not_run(old: Iterable[Row], new: Sequence[Row]) -> list[Row]:
    """Rows of compilers that `new` did not run, and of targets that it left to another version of the same compiler."""
    compilers = {row["compiler"] for row in new}
    made = {(row["compiler"], row["target"]) for row in new}
    targets = {(row["compiler"].split()[0], row["target"]) for row in new}

    def passed_over(row: Row) -> bool:
        compiler, target = row["compiler"], row["target"]
        left = (compiler, target) not in made and (compiler.split()[0], target) in targets
        return compiler not in compilers or left

    return [row for row in old if passed_over(row)]


def broken(rows: Iterable[Row]) -> list[str]:
    """The limits that rows break, in words."""
    found = []
    for row in rows:
        limits: dict[str, tuple[int, int | None]] = {}
        for kernel, configuration, target, what, low, high in LIMITS:
            patterns = ((kernel, row["kernel"]), (configuration, row["configuration"]), (target, row["target"]))
            if all(re.fullmatch(pattern, text) for pattern, text in patterns):
                limits[what] = low, high
        for what, (low, high) in limits.items():
            value = row.get(what, 0)
            if value < low or (high is not None and value > high):
                bound = "any" if high is None else high
                found.append(f"{' | '.join(_key(row))}: {what} is {value}, the limit is {low} to {bound}")
    return found


def differences(old: Iterable[Row], new: Iterable[Row]) -> list[str]:
    """What changed from one report to another, a line a row, but for what `new` did not run."""
    old, new = list(old), list(new)
    after = {_key(row): row for row in new}
    before = {_key(row): row for row in old}
    for row in _not_run(old, new):
        del before[_key(row)]
    lines = []
    for key in sorted(before.keys() | after.keys()):
        name, a, b = " | ".join(key), before.get(key), after.get(key)
        if a is None or b is None:
            lines.append(f"{name}: {'new' if a is None else 'gone'}")
        elif a != b:
            fields = sorted(k for k in a.keys() | b.keys() if a.get(k, 0) != b.get(k, 0))
            lines.append(f"{name}: " + ", ".join(f"{k} {a.get(k, 0)} -> {b.get(k, 0)}" for k in fields))
    return lines


def collect(targets: Sequence[str] = ()) -> list[Row]:
    """Every launch of the catalogue on the targets, or on all, compiled by the Triton that is imported."""
    import triton

    from gpuless.triton import driver, launches

    rows: dict[tuple[str, ...], Row] = {}
    for stem, launch_all in launches.STEMS.items():
        for target in targets or driver.TARGETS:
            with driver.on(target) as done:
                launch_all()
            for launch in done:
                row = {
                    "stem": stem, "kernel": launch.kernel, "configuration": launch.configuration, "target": target,
                    "compiler": f"triton {triton.__version__}",
                }
                if _key(row) not in rows:
                    rows[_key(row)] = {**row, **driver.record(launch)}
    return list(rows.values())


def read(paths: Sequence[str]) -> list[Row]:
    return [row for path in paths for row in json.loads(pathlib.Path(path).read_text())]


def _dump(rows: Iterable[Row], path: pathlib.Path) -> None:
    lines = ",\n".join(json.dumps(row) for row in sorted(rows, key=_key))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"[\n{lines}\n]\n")


def _spilling(rows: Sequence[Row]) -> str:
    names = sorted({f"`{row['kernel']}` on {row['target']} ({row['spill_bytes']} bytes)" for row in rows
                    if row["spill_bytes"]})
    return ", ".join(names) or "no kernel"


COLUMNS: dict[str, tuple[str, ...]] = {     # of the page: what is summed
    "registers": ("registers",), "shared": ("dynamic_shared", "shared"), "instructions": ("instructions",),
    "matrix": ("matrix",), "loads": ("load", "async_load"), "wide loads": ("wide_load",),
    "stores": ("store",), "wide stores": ("wide_store",), "barriers": ("barrier",), "special": ("special",),
}


def _range(values: Iterable[int]) -> str:
    low, *_, high = [*sorted(values)] * 2
    return str(low) if low == high else f"{low} to {high}"


def page(rows: Sequence[Row]) -> str:
    """The report for readers: a line for each kernel and target by its newest compiler, over all configurations."""
    newest: dict[tuple[str, str, str], list[int]] = {}         # Triton and nvcc may both have a kernel of one name
    version = lambda row: [int(n) for n in re.findall(r"\d+", row["compiler"])]
    of = lambda row: (row["stem"], row["kernel"], row["compiler"].split()[0])
    for row in rows:
        newest[of(row)] = max(newest.get(of(row), []), version(row))
    lines = [
        "# What the GPU kernels compile to",
        "",
        "Made by `make kernel-report` on a machine without a GPU, from the compiled kernels themselves; CI fails where",
        "they change. None of this is a measurement: it says what a kernel asks for, not how fast it is. A line is a",
        "kernel on a target: the least and the most over its configurations (dtypes, tiles, options). Occupancy is",
        "resident warps over the most there can be; shared memory is in bytes a block. Loads and stores are",
        "instructions in the code, wide ones move 16 bytes a thread and more.",
        f"Registers are spilled by {_spilling(rows)}.",
        f"All rows, {len({r['compiler'] for r in rows})} compilers, are in `tests/gpuless/kernels.json`.",
    ]
    groups: dict[str, dict[tuple[str, str, str], list[Row]]] = collections.defaultdict(
        lambda: collections.defaultdict(list)
    )
    for row in sorted(rows, key=_key):
        if version(row) == newest[of(row)]:
            groups[row["stem"]][row["kernel"], row["compiler"], row["target"]].append(row)
    for stem, kernels in groups.items():
        head = ["kernel", "compiler", "target", "configurations", "occupancy", *COLUMNS]
        lines += ["", f"## {stem}", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        for (kernel, compiler, target), members in kernels.items():
            occupancy = _range(round(100 * row["occupancy"]) for row in members) + "%"
            cells = [_range(sum(row.get(name, 0) for name in names) for row in members) for names in COLUMNS.values()]
            lines.append(f"| `{kernel}` | {compiler} | {target} | {len(members)} | {occupancy} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str]) -> int:
    command, *paths = arguments
    if command == "collect":
        _dump(collect(paths[1:]), pathlib.Path(paths[0]))
        return 0
    rows = read(paths)
    if faults := broken(rows):
        print("kernel report: limits broken\n" + "\n".join(faults))
        return 1
    if command == "write":
        kept = _not_run(json.loads(BASELINE.read_text()) if BASELINE.exists() else [], rows)
        _dump([*kept, *rows], BASELINE)
        PAGE.write_text(page([*kept, *rows]))
        return 0
    if changed := differences(json.loads(BASELINE.read_text()), rows):
        print("kernel report: not as in tests/gpuless/kernels.json; `make kernel-report` accepts", *changed, sep="\n")
        return 1
    print(f"kernel report: {len(rows)} compiled kernels are as recorded")
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parent))
    sys.exit(main(sys.argv[1:]))
