"""Dropout of which only a seed is kept: the mask is a function of (seed, row, column) and is made again.

The hash is the one of csrc/simd/dropout.h and of triton_dropout.py, bit for bit: 32-bit arithmetic, here in int64
because torch has no unsigned multiplication. A mask therefore depends neither on the device nor on how the
rows were cut.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9
_BITS = 24


def new_seed(device: torch.device) -> Tensor:
    """Returns a seed () int64 on `device`, drawn from torch's own generator of that device."""
    # inside the positive int64 range; a checkpoint restores the generator and so draws the same seed again
    return torch.randint(0, 2**62, (), dtype=torch.int64, device=device)


def threshold(p: float) -> int:
    """Returns how many of 2^24 hashes are dropped with probability p in [0, 1]: those below this number."""
    return round(p * 2**_BITS)


def _mix(h: Tensor) -> Tensor:
    # a product that wraps around in int64 keeps its low 32 bits
    h = h ^ (h >> 16)
    h = (h * 0x7FEB352D) & _WORD
    h = h ^ (h >> 15)
    h = (h * 0x846CA68B) & _WORD
    return h ^ (h >> 16)


def keep_mask(seed: Tensor, first_row: int, rows: int, cols: int, p: float) -> Tensor:
    """Returns (rows, cols) bool: True where dropout with probability p keeps.

    Args:
        seed: one int64, of any shape.
        first_row: number of the first row in the whole matrix.
        rows, cols: shape of the part.
        p: share that is dropped, rounded to 2^-24.
    """
    seed = seed.reshape(())
    row = torch.arange(first_row, first_row + rows, device=seed.device)
    key = _mix(((row >> 32) + _GOLDEN) & _WORD)
    key = _mix((row & _WORD) ^ key)
    key = _mix(((seed >> 32) & _WORD) ^ key)
    key = _mix((seed & _WORD) ^ key)
    column = (torch.arange(cols, device=seed.device) * _GOLDEN) & _WORD
    return (_mix(key[:, None] ^ column) >> (32 - _BITS)) >= threshold(p)
