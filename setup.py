"""A shim over CMakeLists.txt: drives CMake, names the wheel, lists the packages.

Environment (documented in docs/kernels.md): LLM2CLIP_NO_NATIVE, LLM2CLIP_CUDA, LLM2CLIP_HOST, MAX_JOBS,
TORCH_CUDA_ARCH_LIST, CMAKE_ARGS.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
LIBRARY = "llm2clip_kernels._C"


def wants_native() -> bool:
    """Native code is built unless refused or no C++ compiler exists; the latter is said once."""
    if os.environ.get("LLM2CLIP_NO_NATIVE", "") not in ("", "0"):
        return False
    if os.environ.get("CXX") or any(map(shutil.which, ("c++", "g++", "clang++"))):
        return True
    print(
        "llm2clip: WARNING: no C++ compiler found (c++, g++, clang++ or $CXX); installing pure Python. "
        "Everything works, the CPU ops are slower. Install a compiler and reinstall to get them.",
        file=sys.stderr,
    )
    return False


def architectures(torch_list: str) -> str:
    """TORCH_CUDA_ARCH_LIST ("8.0 9.0a+PTX") in CMake's form ("80-real;90a")."""
    out = []
    for entry in torch_list.replace(";", " ").split():
        arch, _, ptx = entry.partition("+")
        # without a suffix CMake embeds both SASS and PTX
        out.append(arch.replace(".", "") + ("" if ptx == "PTX" else "-real"))
    return ";".join(out)


class CMakeBuild(build_ext):
    """Runs CMake once; the extension object only carries the name of what comes out."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"  # loaded by torch.ops.load_library, bound to no Python

    def run(self) -> None:
        source = ROOT / "kernels" / "llm2clip_kernels", ROOT / "llm2clip"
        built = Path(self.build_lib) / "llm2clip_kernels", Path(self.build_lib) / "llm2clip"
        library_dir, host_dir = (p.resolve() for p in (source if self.inplace else built))
        work = Path(self.build_temp).resolve()
        work.mkdir(parents=True, exist_ok=True)
        options = {
            "CMAKE_BUILD_TYPE": "Debug" if self.debug else "Release",
            "Python_EXECUTABLE": sys.executable,
            "LLM2CLIP_OUTPUT_DIR": library_dir,
            "LLM2CLIP_HOST_OUTPUT_DIR": host_dir,
            "LLM2CLIP_CUDA": os.environ.get("LLM2CLIP_CUDA", "AUTO").upper(),
            "LLM2CLIP_HOST": "OFF" if os.environ.get("LLM2CLIP_HOST") == "0" else "ON",
        }
        if arch_list := os.environ.get("TORCH_CUDA_ARCH_LIST"):
            options["CMAKE_CUDA_ARCHITECTURES"] = architectures(arch_list)
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        configure = ["cmake", "-S", str(ROOT), "-B", str(work), *generator]
        configure += [f"-D{key}={value}" for key, value in options.items()]
        subprocess.check_call(configure + shlex.split(os.environ.get("CMAKE_ARGS", "")))
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        subprocess.check_call(["cmake", "--build", str(work), "-j", jobs])

    def get_outputs(self) -> list[str]:
        return [str(Path(self.build_lib) / self.get_ext_filename(LIBRARY))]

    def copy_extensions_to_source(self) -> None:
        """Nothing to copy: CMake wrote in place already."""


class AnyPythonWheel(bdist_wheel):
    """The op library needs no particular Python: py3-none-<platform>."""

    def get_tag(self) -> tuple[str, str, str]:
        platform_tag = super().get_tag()[2]
        return "py3", "none", platform_tag if self.distribution.has_ext_modules() else "any"


modules = [Extension(LIBRARY, sources=[])] if platform.system() == "Linux" and wants_native() else []

setup(
    packages=[*find_packages(include=["llm2clip", "llm2clip.*"]), *find_packages("kernels")],
    package_dir={"llm2clip": "llm2clip", "llm2clip_kernels": "kernels/llm2clip_kernels"},
    package_data={
        "llm2clip": ["py.typed", "demo.yaml", "evaluation/imagenet_templates.txt", "search/static/*"],
        "llm2clip_kernels": ["py.typed"],
    },
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": AnyPythonWheel},
    ext_modules=modules,
)
