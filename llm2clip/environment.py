"""Versions and hardware, for bug reports, run summaries and benchmark results."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from importlib import metadata
from typing import Any

PACKAGES = (
    "llm2clip",
    "torch",
    "triton",
    "numpy",
    "transformers",
    "peft",
    "accelerate",
    "gguf",
    "safetensors",
    "pyarrow",
    "pillow",
    "xformers",
)


def environment() -> dict[str, Any]:
    """Python, packages (None: not installed), processor, cores and CUDA device."""
    import torch

    device = None
    if torch.cuda.is_available():
        device = {
            "name": torch.cuda.get_device_name(),
            "capability": ".".join(map(str, torch.cuda.get_device_capability())),
            "cuda": torch.version.cuda,
        }
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "packages": {name: _version(name) for name in PACKAGES},
        "gpu": device,
    }


def render(info: Mapping[str, Any], indent: str = "") -> str:
    """Nested values as aligned `name  value` lines."""
    width = max((len(str(name)) for name, value in info.items() if not isinstance(value, Mapping)), default=0)
    lines = []
    for name, value in info.items():
        if isinstance(value, Mapping):
            lines.append(f"{indent}{name}")
            lines.append(render(value, indent + "  "))
        else:
            shown = "-" if value is None else ", ".join(map(str, value)) if isinstance(value, list) else value
            lines.append(f"{indent}{name:<{width}}  {shown}")
    return "\n".join(line for line in lines if line)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as handle:
            for line in handle:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
