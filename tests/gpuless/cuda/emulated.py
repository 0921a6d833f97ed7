"""Builds the CUDA sources for the block emulator and loads them: one module a variant, rebuilt where a source changed.

plain       static bounds, alignment, poisoned shared memory
address     AddressSanitizer, every bound; in a process whose first library is its runtime
thread      ThreadSanitizer, every pair of accesses that no barrier orders; likewise
"""
from __future__ import annotations

import contextlib
import fcntl
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
MODULES = {     # what knows Python; and device code with its launchers, a library of its own (see poison_shared)
    "emulated_faults": ([HERE / "faults_module.cpp"], [HERE / "faults.cu", HERE / "fragments.cu"]),
    "emulated_kernels": (BINDINGS, KERNELS),
}
EMULATOR = sorted((HERE / "emulator").glob("*.cpp"))
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
    folder = ROOT / "build" / "emulator"
    folder.mkdir(parents=True, exist_ok=True)
    target = f"{variant}/{module}{sysconfig.get_config_var('EXT_SUFFIX')}"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        plan, text = folder / "build.ninja", _plan()
        if not plan.exists() or plan.read_text() != text:
            plan.write_text(text)
        command = [str(ninja()), "-C", str(folder), "-j2", target]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{module} does not compile for the emulator:\n{done.stdout}{done.stderr}")
    return folder / target


def _plan() -> str:
    """What ninja builds: bindings once, everything else once a variant."""
    import pybind11

    includes = [HERE / "emulator", ROOT / "csrc" / "cuda", ROOT / "csrc" / "include", ROOT / "csrc",
                pybind11.get_include(), sysconfig.get_path("include")]
    common = ["-std=c++17", "-O1", "-g1", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-Wall", "-Wextra",
              "-Wno-unknown-pragmas", *(f"-I{x}" for x in includes), *(["-mfma"] if "fma" in _cpu_flags() else [])]
    lines = [
        "rule compile",
        f"  command = nice {compiler()} -MMD -MF $out.d {' '.join(common)} $flags -x c++ -c $in -o $out",
        "  depfile = $out.d", "  deps = gcc",
        "rule link", f"  command = {compiler()} -shared -o $out $in $flags -ldl '-Wl,-rpath,$$ORIGIN'",
    ]

    def compiled(source: pathlib.Path, target: str, flags: list[str]) -> str:
        lines.extend([f"build {target}: compile {source}", f"  flags = {' '.join(flags)}"])
        return target

    def linked(objects: list[str], target: str, flags: list[str]) -> str:
        lines.extend([f"build {target}: link {' '.join(objects)}", f"  flags = {' '.join(flags)}"])
        return target

    bound = {module: [compiled(source, f"bindings/{module}.{source.name}.o", []) for source in bindings]
             for module, (bindings, _) in MODULES.items()}
    for variant, flags in SANITIZERS.items():
        # The emulator's own accesses are none of a kernel's; only its calls to ThreadSanitizer count.
        own = ["-D__SANITIZE_THREAD__=1"] if variant == "thread" else flags
        machine = [compiled(source, f"{variant}/{source.stem}.o", own) for source in EMULATOR]
        for module, (_, sources) in MODULES.items():
            checked = [*flags, "-fsanitize=alignment,bounds"]
            objects = [compiled(source, f"{variant}/{module}.{source.name}.o", checked) for source in sources]
            library = linked([*objects, *machine], f"{variant}/lib{module}.so",
                             [*flags, f"-Wl,-soname,lib{module}.so"])
            linked([*bound[module], library], f"{variant}/{module}{sysconfig.get_config_var('EXT_SUFFIX')}", flags)
    return "\n".join(lines) + "\n"


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
    from onepass._ops import forget

    module = load("emulated_kernels")
    module.set_order(ORDERS.index(order), seed)
    stems = ("", ".attention", ".attention_varlen", ".denoise", ".gumbel", ".interpolate", ".latent", ".reparam",
             ".rng", ".volrend")
    parts = [importlib.import_module(f"onepass._native{stem}") for stem in stems]
    before = [(part, part._C) for part in parts if hasattr(part, "_C")], _native.cuda_error
    try:
        for part, _ in before[0]:
            part._C = module
        _native.emulated, _native.cuda_error = True, None
        forget()
        yield
    finally:
        for part, own in before[0]:
            part._C = own
        _native.emulated, _native.cuda_error = False, before[1]
        forget()


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
        "OMP_NUM_THREADS": "1",         # ThreadSanitizer cannot see how libgomp orders its threads
        "TSAN_OPTIONS": "report_signal_unsafe=0:exitcode=66:halt_on_error=1",
    }
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)
