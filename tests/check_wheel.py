"""Installs a wheel into an empty environment and looks at what came: `python tests/check_wheel.py WHEEL`.

Not a pytest file: .ci/run calls it with a wheel built without CUDA, tests/test_packaging.py with one from the sdist.
"""
from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import numpy
import torch

USE = """
import json, sys, torch, onepass
from onepass import _native
assert _native.error is None, _native.error
z, kl = onepass.reparameterize_kl(torch.zeros(2, 3), torch.zeros(2, 3), seed=1, backend="cpu")
assert torch.equal(z.flatten(), onepass.rng.normal((6,), seed=1, stream=1 << 56)) and not kl.any()
print(onepass.__file__, _native._C.has_cuda)
"""


def check(wheel: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch, "env")
        venv.create(home, with_pip=False, symlinks=True)
        python = home / "bin" / "python"
        site = Path(subprocess.check_output(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
        ).strip())
        subprocess.check_call(
            [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", str(wheel)]
        )
        installed = {p.name for p in site.iterdir() if not p.name.endswith(".dist-info")}
        assert installed == {"onepass"}, f"the wheel installs {sorted(installed)}, expected onepass alone"
        # torch and numpy come from the environment that runs this; its own onepass does not (no .pth is read there).
        outer = os.pathsep.join({str(Path(module.__file__).parents[1]) for module in (numpy, torch)})
        seen = subprocess.check_output(
            [python, "-c", USE], cwd=scratch, env={**os.environ, "PYTHONPATH": outer}, text=True
        ).split()
        assert Path(seen[0]).is_relative_to(site), f"imported {seen[0]}, expected a file under {site}"
        libraries = subprocess.check_output(["ldd", *map(str, site.glob("onepass/_C.*.so"))], text=True)
        foreign = [name for name in ("libtorch", "libc10", "libpython", "libcuda") if name in libraries]
        assert not foreign, f"onepass._C links {foreign}"
        print(f"{wheel.name}: onepass alone, imports, links no torch and no Python; CUDA part: {seen[1]}")


if __name__ == "__main__":
    check(Path(sys.argv[1]).resolve())
