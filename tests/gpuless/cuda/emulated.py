"""Builds the CUDA sources for the block emulator and loads them: one module a variant, rebuilt where a source changed.

plain       static bounds, alignment, poisoned shared memory
address     AddressSanitizer, every bound; in a process whose first library is its runtime
thread      ThreadSanitizer, every pair of accesses that no barrier orders; likewise
"""
from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from types import ModuleType

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[2]
BINDINGS = [HERE / "kernels_module.cpp", ROOT / "csrc" / "bindings_cuda.cpp", ROOT / "csrc" / "attention.cpp"]
KERNELS = [path for path in sorted((ROOT / "csrc" / "cuda").glob("*.cu")) if path.stem != "device"]
MODULES = {     # what knows Python; and device code with its launchers, a library of its own (see emulator.cpp)
    "emulated_faults": ([HERE / "faults_module.cpp"], [HERE / "faults.cu"]),
    "emulated_kernels": (BINDINGS, KERNELS),
}
EMULATOR = [HERE / "emulator" / "emulator.cpp", HERE / "emulator" / "runtime.cpp"]
SANITIZERS = {"plain": [], "address": ["-fsanitize=address"], "thread": ["-fsanitize=thread"]}
ORDERS = ("ascending", "descending", "shuffled")
VARIANT = os.environ.get("ONEPASS_EMULATOR", "plain")


def why_not() -> str | None:
    """Why the emulator cannot be built here, or None."""
    if not compiler():
        return "no C++ compiler"
    return None if ninja() else "no ninja"


def compiler() -> str | None:
    return os.environ.get("CXX") or shutil.which("g++")


def ninja() -> str | None:
    beside = pathlib.Path(sys.executable).with_name("ninja")
    return str(beside) if beside.exists() else shutil.which("ninja")


def build(module: str, variant: str = VARIANT) -> pathlib.Path:
    """The module's file. Multiply-adds are fused only where a kernel says so."""
    import pybind11

    folder = ROOT / "build" / "emulator" / variant
    folder.mkdir(parents=True, exist_ok=True)
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    includes = [HERE / "emulator", ROOT / "csrc" / "cuda", ROOT / "csrc" / "include", ROOT / "csrc",
                pybind11.get_include(), sysconfig.get_path("include")]
    flags = [
        "-std=c++17", "-O1", "-g1", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-Wall", "-Wextra",
        "-Wno-unknown-pragmas", "-fsanitize=alignment,bounds", *SANITIZERS[variant], *(f"-I{x}" for x in includes),
    ]
    if "fma" in _cpu_flags():
        flags.append("-mfma")
    # The emulator's own accesses are none of the kernel's; only its calls to ThreadSanitizer count.
    own = [*flags, "-fno-sanitize=alignment,bounds"]
    if variant == "thread":
        own += ["-fno-sanitize=thread", "-D__SANITIZE_THREAD__=1"]
    lines = [
        "rule compile", f"  command = nice {compiler()} -MMD -MF $out.d $flags -x c++ -c $in -o $out",
        "  depfile = $out.d", "  deps = gcc",
        "rule link",
        f"  command = {compiler()} -shared -o $out $in {' '.join(SANITIZERS[variant])} -ldl '-Wl,-rpath,$$ORIGIN'",
    ]
    shared = []
    for source in EMULATOR:
        shared.append(f"{source.stem}.o")
        lines += [f"build {shared[-1]}: compile {source}", f"  flags = {' '.join(own)}"]
    for name, (bindings, sources) in MODULES.items():
        parts: list[list[str]] = []
        for group, options in ((bindings, own), (sources, flags)):
            parts.append([f"{name}.{source.name}.o" for source in group])
            for source, target in zip(group, parts[-1], strict=True):
                lines += [f"build {target}: compile {source}", f"  flags = {' '.join(options)}"]
        lines.append(f"build lib{name}.so: link {' '.join(parts[1] + shared)}")
        lines.append(f"build {name}{suffix}: link {' '.join(parts[0])} lib{name}.so")
    plan = folder / "build.ninja"
    text = "\n".join(lines) + "\n"
    if not plan.exists() or plan.read_text() != text:
        plan.write_text(text)
    done = subprocess.run([str(ninja()), "-C", str(folder), "-j2", f"{module}{suffix}"], capture_output=True, text=True,
                          check=False)
    if done.returncode:
        raise RuntimeError(f"{module} does not compile for the emulator:\n{done.stdout}{done.stderr}")
    return folder / f"{module}{suffix}"


def _cpu_flags() -> str:
    try:
        return pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


@functools.cache
def load(module: str) -> ModuleType:
    path = build(module)
    spec = importlib.util.spec_from_file_location(module, path)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@contextlib.contextmanager
def device(order: str = "ascending", seed: int = 1) -> Iterator[None]:
    """The emulator is the CUDA device: backend "cuda" takes host tensors, and the threads run in this order."""
    from onepass import _native

    module = load("emulated_kernels")
    module.set_order(ORDERS.index(order), seed)
    stems = ("", ".attention", ".denoise", ".reparam", ".rng", ".volrend")
    parts = [importlib.import_module(f"onepass._native{stem}") for stem in stems]
    before = [(part, part._C) for part in parts if hasattr(part, "_C")], _native.cuda_error
    try:
        for part, _ in before[0]:
            part._C = module
        _native.emulated, _native.cuda_error = True, None
        yield
    finally:
        for part, own in before[0]:
            part._C = own
        _native.emulated, _native.cuda_error = False, before[1]


def sanitized(variant: str, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Python with these arguments, the sanitizer's runtime loaded first and the emulator built for it."""
    library = {"address": "libasan.so", "thread": "libtsan.so"}[variant]
    preload = [
        subprocess.run([str(compiler()), f"-print-file-name={name}"], capture_output=True, text=True,
                       check=True).stdout.strip()
        for name in (library, "libstdc++.so")
    ]
    environment = {
        **os.environ,
        "ONEPASS_EMULATOR": variant,
        "LD_PRELOAD": " ".join(preload),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "TSAN_OPTIONS": "report_signal_unsafe=0:exitcode=66:halt_on_error=1",
    }
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)
