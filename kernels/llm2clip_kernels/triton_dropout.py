"""The mask of dropout.py inside a Triton kernel, bit for bit."""

# mypy: disable-error-code="no-untyped-def"
# (Triton reads the annotations of its kernels as types of its own)

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _mix(h):
    h = h ^ (h >> 16)
    h = h * 0x7FEB352D
    h = h ^ (h >> 15)
    h = h * 0x846CA68B
    return h ^ (h >> 16)


@triton.jit
def keeps(
    seed_ptr,  # one i64
    row,  # number of the row in the whole matrix, i64, of any shape
    column,  # broadcasts against row
    threshold,  # dropout.threshold(p)
):
    seed = tl.load(seed_ptr)
    key = _mix((row >> 32).to(tl.uint32) + 0x9E3779B9)
    key = _mix(row.to(tl.uint32) ^ key)
    key = _mix((seed >> 32).to(tl.uint32) ^ key)
    key = _mix(seed.to(tl.uint32) ^ key)
    spread = column.to(tl.uint32) * 0x9E3779B9
    hashed = _mix(key ^ spread) >> 8
    return hashed.to(tl.int32) >= threshold
