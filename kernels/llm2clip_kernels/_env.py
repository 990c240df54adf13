"""The only reader of environment variables in this package.

| variable | values | meaning |
|---|---|---|
| `LLM2CLIP_DISABLE_NATIVE` | `1` | do not load the native library; Triton and plain torch serve |
| `LLM2CLIP_REQUIRE_NATIVE` | `1` | a native library that is missing or does not load is an error |
| `LLM2CLIP_BACKEND` | `auto`, `native`, `triton`, `chunked` | forces one implementation (tests, bisecting) |
| `LLM2CLIP_CPU_ISA` | `auto`, `portable`, `avx2`, `avx512` | vector instructions of the CPU kernels; `auto`: the best |
| `LLM2CLIP_CPU_GEMM` | `auto`, `torch`, `avx2`, `avx512` | what multiplies the tiles on a CPU; `auto`: ours on AMD |
| `LLM2CLIP_CACHE_MIB` | integer, default 256 | byte budget under which `method="auto"` caches exponentials |
| `LLM2CLIP_SMALL_PAIRS` | integer, default 44100 | up to so many pairs, plain torch: launching a kernel costs more |
| `LLM2CLIP_AUTOTUNE` | `1` | time the Triton configurations on first use, keep the fastest in the tuning file |
| `LLM2CLIP_TUNING_FILE` | path, default `~/.cache/llm2clip/tuning.json` | where found configurations are kept |
| `TRITON_INTERPRET` | `1` | Triton's own: kernels run in its interpreter, on CPU tensors too |
"""

from __future__ import annotations

import os
from pathlib import Path

BACKENDS = ("auto", "native", "triton", "chunked")
CPU_ISAS = ("auto", "portable", "avx2", "avx512")
CPU_GEMMS = ("auto", "torch", "avx2", "avx512")


def _flag(name: str) -> bool:
    return os.environ.get(name, "") not in ("", "0")


def native_disabled() -> bool:
    return _flag("LLM2CLIP_DISABLE_NATIVE")


def native_required() -> bool:
    return _flag("LLM2CLIP_REQUIRE_NATIVE")


def triton_interpreted() -> bool:
    return _flag("TRITON_INTERPRET")


def _one_of(variable: str, names: tuple[str, ...]) -> str:
    name = os.environ.get(variable, "auto").lower() or "auto"
    if name not in names:
        raise ValueError(f"{variable} is {name!r}; expected one of {', '.join(names)}")
    return name


def forced_backend() -> str:
    """Returns the backend to use, "auto" for the usual choice. Raises ValueError for an unknown name."""
    return _one_of("LLM2CLIP_BACKEND", BACKENDS)


def cpu_isa() -> str:
    """Returns which vector instructions native CPU kernels use, "auto" for the best. Raises ValueError as above."""
    return _one_of("LLM2CLIP_CPU_ISA", CPU_ISAS)


def cpu_gemm() -> str:
    """Returns what is to multiply tiles on the CPU, "auto" for the usual choice. Raises ValueError as above."""
    return _one_of("LLM2CLIP_CPU_GEMM", CPU_GEMMS)


def _whole_number(name: str, default: int, unit: str) -> int:
    text = os.environ.get(name, str(default))
    try:
        number = int(text)
    except ValueError:
        number = -1
    if number < 0:
        raise ValueError(f"{name} is {text!r}; expected a whole number{unit}, 0 or more")
    return number


def cache_budget_bytes() -> int:
    """Returns how many bytes of cached exponentials `method="auto"` may keep for the backward pass."""
    return _whole_number("LLM2CLIP_CACHE_MIB", 256, " of MiB") * 2**20


def small_pairs() -> int:
    """Returns up to how many pairs M·N `method="auto"` leaves to plain torch; 0 where a backend is forced."""
    return 0 if forced_backend() != "auto" else _whole_number("LLM2CLIP_SMALL_PAIRS", 210 * 210, " of pairs")


def autotune() -> bool:
    return _flag("LLM2CLIP_AUTOTUNE")


def tuning_file() -> Path:
    """Returns the file of configurations found by searching."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llm2clip" / "tuning.json"
    return Path(os.environ.get("LLM2CLIP_TUNING_FILE") or default).expanduser()
