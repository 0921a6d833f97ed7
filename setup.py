"""Builds onepass._C with CMake. engine/ is imported as onepass, kernels/ as onepass.kernels."""
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import tempfile

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = pathlib.Path(__file__).parent.resolve()

# Explicit: discovery would find kernels/ itself and install it under a name that is somebody else's.
PACKAGES = {
    "onepass": "engine",
    "onepass._native": "engine/_native",
    "onepass._ops": "engine/_ops",
    "onepass.benches": "benches",
    "onepass.demo": "engine/demo",
    "onepass.integrations": "engine/integrations",
    "onepass.integrations.flash_attn": "engine/integrations/flash_attn",
    "onepass.integrations.flash_attn.layers": "engine/integrations/flash_attn/layers",
    "onepass.integrations.transformers": "engine/integrations/transformers",
    "onepass.reference": "engine/reference",
    "onepass.kernels": "kernels",
    "onepass.plans": "engine/plans",
}


# The oldest compilers that the tests have passed with.
PROBE = """
#if defined(__clang__) ? __clang_major__ < 14 : __GNUC__ < 11
#error "this compiler is too old: GCC 11 or Clang 14 is needed"
#endif
#include <omp.h>
int main() { return omp_get_max_threads() < 1; }
"""


def compiler() -> list[str]:
    """The C++ compiler that CMake would choose, as words of a command; empty where there is none."""
    if chosen := shlex.split(os.environ.get("CXX", "")):
        return chosen
    return next(([name] for name in ("c++", "g++", "clang++") if shutil.which(name)), [])


def obstacle() -> str | None:
    """Why the C++ kernels cannot be built here."""
    if sys.platform != "linux":
        return f"the C++ kernels are for Linux, this is {sys.platform}"
    command = compiler()
    if not command:
        return "no C++ compiler found"
    with tempfile.TemporaryDirectory() as scratch:
        arguments = ["-std=c++17", "-fopenmp", "-x", "c++", "-", "-o", os.path.join(scratch, "probe")]
        try:
            subprocess.run([*command, *arguments], input=PROBE, text=True, check=True, stderr=subprocess.PIPE)
        except OSError as failure:
            return f"{shlex.join(command)} does not run ({failure.strerror})"
        except subprocess.CalledProcessError as failure:
            said = next((line for line in failure.stderr.splitlines() if "error" in line), failure.stderr.strip())
            return f"{shlex.join(command)} cannot build C++17 with OpenMP ({said})"
    return None


class CMakeBuild(build_ext):
    """CMake and ninja into one build folder a Python; where no compiler is fit the package is pure Python and says so.

    ONEPASS_NATIVE=1 makes that an error, ONEPASS_NATIVE=0 asks for it.
    """

    def build_extension(self, ext: Extension) -> None:
        target = pathlib.Path(self.get_ext_fullpath(ext.name)).resolve()
        native = os.environ.get("ONEPASS_NATIVE", "")
        if reason := "ONEPASS_NATIVE is 0" if native == "0" else obstacle():
            if native not in ("", "0"):
                raise SystemExit(f"onepass: {reason}; CXX names another compiler, ONEPASS_NATIVE=0 builds without one")
            print(f"onepass: {reason}: installing the pure-Python build (reference backend only)")
            target.unlink(missing_ok=True)      # an older build's must not go into this wheel
            return
        import pybind11

        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        build.mkdir(parents=True, exist_ok=True)
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": str(target.parent),
            "CMAKE_MAKE_PROGRAM": shutil.which("ninja") or "ninja",
            "ONEPASS_CUDA": "OFF" if os.environ.get("ONEPASS_CUDA") == "0" else "ON",
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
        }
        if architectures := os.environ.get("ONEPASS_CUDA_ARCHITECTURES"):
            options["CMAKE_CUDA_ARCHITECTURES"] = architectures
        configure = ["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja"]
        subprocess.check_call([*configure, *(f"-D{name}={value}" for name, value in options.items())])
        subprocess.check_call(["cmake", "--build", str(build)])


setup(
    packages=list(PACKAGES),
    package_dir=PACKAGES,
    include_package_data=False,
    package_data={"onepass": ["py.typed", "*.pyi"], "onepass.demo": ["weights/*.safetensors"]},
    ext_modules=[Extension("onepass._C", [])],
    cmdclass={"build_ext": CMakeBuild},
)
