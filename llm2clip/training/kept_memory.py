"""Memory that a step frees stays with the process, for the next step needs it again.

glibc gives every freed block above 32 MiB back to the system, and the top of its heap. A training step on a CPU
allocates and frees the same large activations each time, so the kernel hands out and zeroes the same pages again and
again: of a step of 256 images on a small convolutional tower a quarter was that (docs/results.md).
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

# mallopt's parameters, as <malloc.h> of glibc numbers them
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MIB = 1 << 20
# one block above this is rare enough to go back: the heap could not use it for anything smaller
_LARGEST_KEPT = 1024 * _MIB
_NEVER = 2**31 - 1
# what glibc's own thresholds, which move until they are set, come to in a process with large blocks
_USUAL = {_M_MMAP_THRESHOLD: 32 * _MIB, _M_TRIM_THRESHOLD: 64 * _MIB}
_CHOSEN = re.compile(r"glibc\.malloc\.(mmap|trim)_threshold")


@contextmanager
def kept_memory(device: torch.device) -> Iterator[bool]:
    """Inside the block the process keeps what it frees; afterwards it gives free memory back.

    Costs the holes between the blocks of a step: the peak of a run is up to a fifth higher, from its first steps on.
    MALLOC_TRIM_THRESHOLD_=131072 in the environment has everything given back at once, slower than without either.

    Args:
        device: where the work is done. Nothing is changed for a GPU, whose allocator torch has itself, nor with another
            C library than glibc, nor where MALLOC_MMAP_THRESHOLD_, MALLOC_TRIM_THRESHOLD_ or GLIBC_TUNABLES already
            say what is wanted.

    Yields:
        Whether freed memory is kept.
    """
    mallopt = _mallopt() if device.type == "cpu" else None
    if mallopt is None:
        yield False
        return
    mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT)
    mallopt(_M_TRIM_THRESHOLD, _NEVER)
    try:
        yield True
    finally:
        for parameter, value in _USUAL.items():
            mallopt(parameter, value)
        ctypes.CDLL(None).malloc_trim(0)


def _mallopt() -> Callable[[int, int], int] | None:
    """glibc's function, unless there is another C library or somebody has chosen thresholds already."""
    names = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
    if any(name in os.environ for name in names) or _CHOSEN.search(os.environ.get("GLIBC_TUNABLES", "")):
        return None
    try:
        if not (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc"):
            return None
    except (AttributeError, ValueError, OSError):  # another system, or another C library
        return None
    return getattr(ctypes.CDLL(None), "mallopt", None)
