"""Dropout of which only a seed is kept: the mask is a function of (seed, row, column) and is made again.

The hash is the one of csrc/dropout_rows.cpp and of kernel.py, bit for bit: 32-bit arithmetic, here in int64
because torch has no unsigned multiplication. A mask therefore depends neither on the device nor on how the
rows were cut.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _env, backend, native

_WORD = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9
_BITS = 24


def new_seed(device: torch.device) -> Tensor:
    """Returns a seed () int64 on `device`, drawn from torch's own generator of that device."""
    # inside the positive int64 range; a checkpoint restores the generator and so draws the same seed again
    return torch.randint(0, 2**62, (), dtype=torch.int64, device=device)


def _mix(h: Tensor) -> Tensor:
    h = h ^ (h >> 16)
    h = (h * 0x7FEB352D) & _WORD
    h = h ^ (h >> 15)
    h = (h * 0x846CA68B) & _WORD
    return h ^ (h >> 16)


def keep_mask(seed: Tensor, first_row: int, rows: int, cols: int, p: float) -> Tensor:
    """Returns (rows, cols) bool: True where dropout with probability p keeps.

    Args:
        seed: () int64.
        first_row: number of the first row in the whole matrix.
        rows, cols: shape of the part.
        p: share that is dropped, rounded to 2^-24.
    """
    row = torch.arange(first_row, first_row + rows, device=seed.device)
    key = _mix(((row >> 32) + _GOLDEN) & _WORD)
    key = _mix((row & _WORD) ^ key)
    key = _mix(((seed >> 32) & _WORD) ^ key)
    key = _mix((seed & _WORD) ^ key)
    column = _mix((torch.arange(cols, device=seed.device) + _GOLDEN) & _WORD)
    return (_mix(key[:, None] ^ column) >> (32 - _BITS)) >= round(p * 2**_BITS)


def dropout_rows_(t: Tensor, seed: Tensor, first_row: int, p: float) -> Tensor:
    """Zeroes the share p of a contiguous (rows, cols) matrix in place; what is kept is not rescaled.

    Args:
        t: any float dtype.
        seed: () int64 on t's device.
        first_row: number of t's first row in the whole matrix.
        p: share that is dropped.

    Returns:
        t.
    """
    forced = _env.forced_backend()
    if t.device.type == "cpu" and forced in ("auto", "native") and native.available():
        torch.ops.llm2clip_native.dropout_rows_(t, int(seed.item()), first_row, p)
    elif forced == "triton" or (t.is_cuda and forced == "auto" and backend.triton_available()):
        from . import kernel

        kernel.dropout_rows_(t, seed, first_row, round(p * 2**_BITS))
    else:
        t.mul_(keep_mask(seed, first_row, t.shape[0], t.shape[1], p))
    return t
