"""onepass.benches: how fast each op is here, beside what else is installed, and how far from this machine's limits.

`main` is what `onepass bench` runs. A stem's cases are in `bench_<stem>.py`; docs/benchmarks.md says how rows are made.
"""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run `onepass bench` with these arguments and return its exit status; ImportError names a missing extra."""
    from .cli import main as run

    return run(argv)


__all__ = ["main"]
