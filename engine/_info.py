"""What `onepass info` says: versions, processor, GPU, and the table of ops and backends with why a cell is off."""
from __future__ import annotations

import platform
import textwrap
from pathlib import Path
from typing import Any

import torch

from . import __version__, _native, _supports_triton, registry


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _gpus() -> list[str]:
    if torch.cuda.is_available():
        return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    if _native.error is None and _native._C.has_cuda:
        try:
            return _native._C.cuda_devices()
        except RuntimeError as error:
            return [f"none usable ({error})"]
    return []


def _triton() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


def _why_off(op: registry.Op, backend: str) -> str | None:
    """Why a backend cannot run here at all, or None."""
    if backend not in op.impls:
        return "no kernel yet"
    if backend == "triton":
        return _supports_triton.missing() or (None if torch.cuda.is_available() else "torch sees no GPU")
    return {"cpu": _native.error, "cuda": _native.cuda_error}.get(backend)


def collect() -> dict[str, Any]:
    native = _native.error is None
    return {
        "onepass": __version__,
        "torch": torch.__version__,
        "triton": _triton(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "native": None if native else _native.error,
        "instruction_set": _native._C.isa if native else None,
        "attention_instruction_set": _native._C.attention_isa if native else None,
        "instruction_sets": list(_native._C.usable_isas) if native else [],
        "cuda_built": native and _native._C.has_cuda,
        "gpus": _gpus(),
        "backend": registry._chosen.get(),
        "ops": {
            op.name: {
                "public": op.public,
                "backends": {b: {"off": _why_off(op, b), "takes": op.impls[b].takes if b in op.impls else None}
                             for b in registry.BACKENDS},
            }
            for op in registry.OPS.values()
        },
    }


def text() -> str:
    facts = collect()
    native, attention = facts["instruction_set"], facts["attention_instruction_set"]
    chosen = native if attention == native else f"{native}, attention {attention}"
    head = [
        ("onepass", facts["onepass"]),
        ("torch", f"{facts['torch']}, {facts['threads']} threads"),
        ("triton", facts["triton"] or "not installed"),
        ("python", f"{facts['python']} on {facts['system']}"),
        ("processor", facts["processor"]),
        ("kernels", f"{chosen} (of {', '.join(facts['instruction_sets'])})" if native else facts["native"]),
        ("CUDA part", "built" if facts["cuda_built"] else "not built"),
        ("GPU", "; ".join(facts["gpus"]) or "none"),
        ("backend", facts["backend"] or "chosen call by call"),
    ]
    lines = [f"{name:<10} {value}" for name, value in head]
    width = max(map(len, facts["ops"]))
    lines += ["", " ".join([f"{'op':<{width}}"] + [f"{b:>9}" for b in registry.BACKENDS])]
    reasons: dict[str, list[str]] = {}
    for name, row in facts["ops"].items():
        cells = []
        for backend, cell in row["backends"].items():
            cells.append("on" if cell["off"] is None else "-")
            if cell["off"]:
                reasons.setdefault(f"{backend}: {cell['off']}", []).append(name)
        lines.append(" ".join([f"{name:<{width}}"] + [f"{c:>9}" for c in cells]))
    lines.append("")
    for reason, names in reasons.items():
        which = "every op" if len(names) == len(facts["ops"]) else ", ".join(names)
        lines += textwrap.wrap(f"- {reason} ({which})", 80, subsequent_indent="  ", break_long_words=False)
    return "\n".join(lines)


def markdown() -> str:
    """The table as documentation: what each backend takes, the same on every machine."""
    lines = [
        "# Ops and backends",
        "",
        "Made by `make docs` from the table in `engine/registry.py`. A call goes to the first backend of its device",
        "that takes it, else to the reference with one `onepass.FallbackWarning`; `backend=` asks for one and raises",
        "with the reason where it cannot be.",
        "",
        "| op | serves | cuda | triton | cpu | reference |",
        "|---|---|---|---|---|---|",
    ]
    for op in registry.OPS.values():
        cells = [op.impls[b].takes if b in op.impls else "no kernel yet" for b in registry.BACKENDS]
        lines.append("| " + " | ".join([f"`{op.name}`", op.public, *cells]) + " |")
    return "\n".join(lines)
