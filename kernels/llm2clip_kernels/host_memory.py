"""Large memory of the CPU that outlives a call, kept so that the next call need not get it from the system again.

A matrix of exponentials lives from a forward pass to its backward pass. Memory that is new each time has to be cleared
and mapped page by page as it is written, which took 5 to 10 % of the whole step (docs/design-notes.md). So one block is
kept, under `MADV_FREE`: the system may take its pages whenever it is short of memory, and pays nothing for them; the
block then has to be mapped again, as if it were new. Blocks above LLM2CLIP_CACHE_MIB are not kept.
"""

from __future__ import annotations

import mmap
import weakref

import torch
from torch import Tensor

from . import _env

# below this the allocator of the C library keeps memory by itself
_LEAST = 32 * 2**20
_MOST = _env.cache_budget_bytes()
# Windows has neither; there is no other cheap way to keep memory that somebody else may need
_KEEPS = hasattr(mmap, "MADV_FREE") and hasattr(mmap, "MAP_PRIVATE")
# at most one; its methods are atomic, and finalizers may run at any point
_kept: list[mmap.mmap] = []


def floats(count: int) -> Tensor:
    """Returns (count,) fp32 on the CPU, not initialised; its memory is kept for later calls once nobody holds it."""
    size = 4 * count
    if not (_KEEPS and _LEAST <= size <= _MOST):
        return torch.empty(count, dtype=torch.float32)
    block = _block(size)
    view = memoryview(block)
    # the tensor's storage holds the view, and the view the block
    weakref.finalize(view, _keep, block).atexit = False
    return torch.frombuffer(view, dtype=torch.float32, count=count)


def _block(size: int) -> mmap.mmap:
    try:
        block = _kept.pop()
    except IndexError:
        block = None
    if block is not None and len(block) >= size:
        return block
    # private: after a fork each process has its own
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def _keep(block: mmap.mmap) -> None:
    try:
        block.madvise(mmap.MADV_FREE)
    except OSError:  # a kernel that does not know it: the block goes back at once
        return
    _kept[:] = [block]


__all__ = ["floats"]
