"""The only reader of environment variables in this package.

| variable | values | meaning |
|---|---|---|
| `LLM2CLIP_DISABLE_NATIVE` | `1` | do not load the native library; Triton and plain torch serve |
| `LLM2CLIP_REQUIRE_NATIVE` | `1` | a native library that is missing or does not load is an error |
| `LLM2CLIP_BACKEND` | `auto`, `native`, `triton`, `chunked` | forces one implementation (tests, bisecting) |
| `LLM2CLIP_CACHE_MIB` | integer, default 256 | byte budget under which `method="auto"` caches exponentials |
| `TRITON_INTERPRET` | `1` | Triton's own: kernels run in its interpreter, on CPU tensors too |
"""

from __future__ import annotations

import os

BACKENDS = ("auto", "native", "triton", "chunked")


def _flag(name: str) -> bool:
    return os.environ.get(name, "") not in ("", "0")


def native_disabled() -> bool:
    return _flag("LLM2CLIP_DISABLE_NATIVE")


def native_required() -> bool:
    return _flag("LLM2CLIP_REQUIRE_NATIVE")


def triton_interpreted() -> bool:
    return _flag("TRITON_INTERPRET")


def forced_backend() -> str:
    """Returns the backend to use, "auto" for the usual choice. Raises ValueError for an unknown name."""
    name = os.environ.get("LLM2CLIP_BACKEND", "auto").lower() or "auto"
    if name not in BACKENDS:
        raise ValueError(f"LLM2CLIP_BACKEND is {name!r}; expected one of {', '.join(BACKENDS)}")
    return name


def cache_budget_bytes() -> int:
    """Returns how many bytes of cached exponentials `method="auto"` may keep for the backward pass."""
    text = os.environ.get("LLM2CLIP_CACHE_MIB", "256")
    try:
        budget = int(text)
    except ValueError:
        budget = -1
    if budget < 0:
        raise ValueError(f"LLM2CLIP_CACHE_MIB is {text!r}; expected a whole number of MiB, 0 or more")
    return budget * 2**20
