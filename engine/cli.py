"""The command line: `onepass info`, `onepass demo`, `onepass bench`. info, --version and --help need only the core."""
from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from . import __version__


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="onepass", description="Fused kernels for generative models, the same numbers on every backend."
    )
    parser.add_argument("--version", action="version", version=f"onepass {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)

    info = commands.add_parser("info", help="versions, processor, and which op runs on which backend")
    form = info.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="as JSON")
    form.add_argument("--markdown", action="store_true", help="the table of ops as docs/ops.md holds it")

    demo = commands.add_parser("demo", help="four generative workloads, stock against onepass, and a report")
    demo.add_argument("--only", action="append", metavar="NAME", help="one workload; may be repeated")
    demo.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    demo.add_argument("--out", type=Path, default=Path("demo_out"), metavar="DIR", help="default: demo_out")

    commands.add_parser("bench", help="time every op against its peers", add_help=False)
    return parser


def _needs(extra: str, module: str) -> ModuleType:
    """A part of onepass whose libraries come with an extra."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("onepass"):
            raise
        raise SystemExit(
            f"onepass {extra} needs {error.name}, which comes with an extra: pip install 'onepass[{extra}]'"
        ) from None


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["bench"]:                 # its options belong to the benchmarks, which carry their parser
        return int(_needs("bench", "onepass.benches").main(arguments[1:]))
    options = _parser().parse_args(arguments)
    if options.command == "demo":
        return int(_needs("demo", "onepass.demo").main(options.only, options.device, options.out))
    from . import _info

    if options.json:
        print(json.dumps(_info.collect(), indent=2))
    else:
        print(_info.markdown() if options.markdown else _info.text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
