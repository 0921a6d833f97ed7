"""Builds onepass._C with CMake. engine/ is imported as onepass, kernels/ as onepass.kernels."""
import os
import pathlib
import shutil
import subprocess
import sys

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


class CMakeBuild(build_ext):
    """CMake and ninja into one build folder a Python; without a C++ compiler the package is pure Python and says so."""

    def build_extension(self, ext: Extension) -> None:
        target = pathlib.Path(self.get_ext_fullpath(ext.name)).resolve()
        if not (os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")):
            print("onepass: no C++ compiler found: installing the pure-Python build (reference backend only)")
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
