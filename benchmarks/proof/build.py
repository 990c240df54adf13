"""The section that builds the native library for the GPU at hand and loads it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from typing import Any

import torch

from benchmarks.proof import layout
from benchmarks.proof.layout import BUILT, ROOT
from benchmarks.proof.sections import Context


def architecture(major: int, minor: int) -> str:
    """Returns CMake's name of a GPU's architecture; from Hopper on, with the instructions that only it has."""
    return f"{major}{minor}{'a' if major >= 9 else ''}-real"


def _run(command: list[str], seconds: float, **more: Any) -> str:
    print("$", *command, flush=True)
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, cwd=ROOT, **more)
    print(done.stdout, done.stderr, flush=True)
    assert done.returncode == 0, f"{command[0]} failed: {(done.stderr or done.stdout).strip()[-800:]}"
    return done.stdout


def build(context: Context) -> dict[str, Any]:
    """Builds with CUDA for this GPU, beside a copy of the package, and loads it; the dry run takes what is there."""
    shutil.rmtree(BUILT.parent, ignore_errors=True)
    package = layout.copy_package()
    options = [
        f"-DLLM2CLIP_OUTPUT_DIR={package}",
        f"-DPython_EXECUTABLE={sys.executable}",
        "-DLLM2CLIP_HOST=OFF",
    ]
    arch = ""
    if context.dry:
        options.append("-DLLM2CLIP_CUDA=OFF")
    else:
        arch = architecture(*torch.cuda.get_device_capability())
        options += ["-DLLM2CLIP_CUDA=ON", f"-DCMAKE_CUDA_ARCHITECTURES={arch}"]
    if shutil.which("ninja"):
        options += ["-G", "Ninja"]
    folder = str(BUILT.parent / "cmake")
    _run(["cmake", "-S", str(ROOT), "-B", folder, *options], context.seconds)
    _run(["cmake", "--build", folder, "-j", str(os.cpu_count() or 2)], context.seconds)
    code = "import json, llm2clip_kernels as k; print(json.dumps(k.build_info()))"
    environment = os.environ | {"PYTHONPATH": str(BUILT), "LLM2CLIP_REQUIRE_NATIVE": "1"}
    info = json.loads(_run([sys.executable, "-c", code], 120, env=environment).splitlines()[-1])
    assert info["native"]["loaded"]
    if not context.dry:
        assert info["native"]["cuda_sources"] and info["native"]["architectures"] == [arch], info["native"]
    layout.mark_built()
    return {"architecture": arch, "native": info["native"]}
