"""Triton kernels on CPU tensors: the interpreter with its arithmetic repaired and its memory guarded.

`install()` before the first launch, in a process where TRITON_INTERPRET=1 was set before any kernel was decorated.
`tests/helpers.py` does both where that variable is set, so that the tests of every op run their Triton kernels so.
"""
from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch

ON = os.environ.get("TRITON_INTERPRET") == "1"
_installed = False


def install() -> None:
    """Repairs and guards the interpreter, once; fresh tensors of torch then hold NaN, so that unset results show."""
    global _installed
    if _installed:
        return
    if not ON:
        raise RuntimeError("TRITON_INTERPRET=1 is not set: kernels decorated without it are compiled")
    from . import guard, repair

    repair.install()
    guard.install()
    _patch_once()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    _installed = True


def _patch_once() -> None:
    """Patches triton.language once a launch, not at each call of a device function: half of the time."""
    from triton.runtime import interpreter

    tl = interpreter.tl
    plain_patch, plain_call = interpreter._patch_lang, interpreter.GridExecutor.__call__
    scopes: dict[tuple[int, ...], Any] = {}
    depth = 0

    def patch(fn: Any) -> Any:
        key = tuple(sorted({id(v) for v in fn.__globals__.values() if v is tl or v is tl.core}))
        if key not in scopes:
            scopes[key] = plain_patch(fn)
        return _Nothing()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal depth
        depth += 1
        try:
            with np.errstate(all="ignore"):         # infinities and NaN are as quiet as on a GPU
                return plain_call(self, *args, **kwargs)
        finally:
            depth -= 1
            if not depth:
                for scope in reversed(scopes.values()):
                    scope.restore()
                scopes.clear()

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch, call


class _Nothing:
    """In the place of a patch that the launch undoes at its end."""

    def restore(self) -> None:
        pass
