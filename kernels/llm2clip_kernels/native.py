"""Loads the native library, once; says why where it cannot, and lets the other backends serve."""

from __future__ import annotations

import functools
import json
import warnings
from pathlib import Path
from typing import Any

import torch

from . import _env

_HERE = Path(__file__).parent


@functools.cache
def load() -> str:
    """Loads the op library beside this file.

    Returns:
        "" when loaded, else the reason it is not.

    Raises:
        RuntimeError: it is not loaded and LLM2CLIP_REQUIRE_NATIVE=1, or this processor does not run what
            LLM2CLIP_CPU_ISA or LLM2CLIP_CPU_GEMM asks for.
    """
    library = _HERE / "_C.so"
    if _env.native_disabled():
        reason = "disabled by LLM2CLIP_DISABLE_NATIVE"
    elif not library.is_file():
        reason = "not built (installed with LLM2CLIP_NO_NATIVE=1 or without a C++ compiler)"
    else:
        try:
            torch.ops.load_library(str(library))
        except (OSError, RuntimeError) as error:
            reason = f"{library.name} does not load: {error}"
            warnings.warn(
                f"llm2clip_kernels: {reason}. Triton and plain torch serve instead; reinstall llm2clip to "
                "build the library for this machine.",
                RuntimeWarning,
                stacklevel=2,
            )
        else:
            torch.ops.llm2clip_native.use_instruction_set(_env.cpu_isa())
            torch.ops.llm2clip_native.use_gemm(_env.cpu_gemm())
            return ""
    if _env.native_required():
        raise RuntimeError(f"llm2clip_kernels: LLM2CLIP_REQUIRE_NATIVE=1, but the native library is {reason}")
    return reason


def available() -> bool:
    """Returns whether the native ops can be called."""
    return load() == ""


def build_record() -> dict[str, Any]:
    """Returns what the library was built with; empty where none was built."""
    try:
        record: dict[str, Any] = json.loads((_HERE / "build_record.json").read_text())
    except (OSError, ValueError):
        return {}
    return record


def has_cuda() -> bool:
    """Returns whether the library holds CUDA kernels and this torch can launch them."""
    return torch.version.cuda is not None and bool(build_record().get("cuda_sources")) and available()
