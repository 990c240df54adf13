"""Triton kernels of `l2_normalize`: a program reads one row, and holds it where it fits a block."""

# mypy: disable-error-code="no-untyped-def"
# (Triton reads the annotations of its kernels as types of its own)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_launch import on_its_device

# elements of a row in registers at a time; longer rows are read in pieces, the second time from the cache
LARGEST_BLOCK = 4096


def row_block(cols: int) -> tuple[int, int]:
    """Returns the block of columns and the warps for rows of `cols` elements."""
    block = min(LARGEST_BLOCK, max(16, triton.next_power_of_2(cols)))
    return block, min(8, max(1, block // 512))


@triton.jit
def l2_normalize_fwd_kernel(
    x_ptr,  # (N, D)
    y_ptr,  # (N, D), any dtype
    norm_ptr,  # (N,) f32
    eps,
    D,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    squares = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, D, BLOCK):
        col = start + offs
        x = tl.load(x_ptr + row * D + col, mask=col < D, other=0.0).to(tl.float32)
        squares += x * x
    norm = tl.sqrt(tl.sum(squares, axis=0))
    tl.store(norm_ptr + row, norm)
    # written so that NaN stays NaN
    inverse = 1.0 / tl.where(norm < eps, eps, norm)
    for start in range(0, D, BLOCK):
        col = start + offs
        x = tl.load(x_ptr + row * D + col, mask=col < D, other=0.0).to(tl.float32)
        tl.store(y_ptr + row * D + col, (x * inverse).to(y_ptr.dtype.element_ty), mask=col < D)


@triton.jit
def l2_normalize_bwd_kernel(
    g_ptr,  # (N, D), dtype of y
    saved_ptr,  # (N, D): y, or x where not UNIT
    norm_ptr,  # (N,) f32
    dx_ptr,  # (N, D), dtype of x
    eps,
    D,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    norm = tl.load(norm_ptr + row)
    small = norm < eps
    inverse = 1.0 / tl.where(small, eps, norm)
    unit = 1.0 if UNIT else inverse
    dots = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, D, BLOCK):
        col = start + offs
        g = tl.load(g_ptr + row * D + col, mask=col < D, other=0.0).to(tl.float32)
        kept = tl.load(saved_ptr + row * D + col, mask=col < D, other=0.0).to(tl.float32)
        dots += g * (kept * unit)
    # a constant norm below eps has no gradient
    along = tl.where(small, 0.0, tl.sum(dots, axis=0))
    for start in range(0, D, BLOCK):
        col = start + offs
        g = tl.load(g_ptr + row * D + col, mask=col < D, other=0.0).to(tl.float32)
        kept = tl.load(saved_ptr + row * D + col, mask=col < D, other=0.0).to(tl.float32)
        dx = (g - kept * unit * along) * inverse
        tl.store(dx_ptr + row * D + col, dx.to(dx_ptr.dtype.element_ty), mask=col < D)


@on_its_device
def forward(x: Tensor, dtype: torch.dtype, eps: float) -> tuple[Tensor, Tensor]:
    """Returns y (N, D) in `dtype` and the norms (N,) fp32. x (N, D), contiguous, not fp64."""
    rows, cols = x.shape
    y = x.new_empty(rows, cols, dtype=dtype)
    norm = x.new_empty(rows, dtype=torch.float32)
    block, warps = row_block(cols)
    if rows:
        l2_normalize_fwd_kernel[(rows,)](x, y, norm, eps, cols, BLOCK=block, num_warps=warps)
    return y, norm


@on_its_device
def backward(
    g: Tensor, saved: Tensor, norm: Tensor, eps: float, saved_is_unit: bool, dtype: torch.dtype
) -> Tensor:
    """Returns dx (N, D) in `dtype`; arguments as in `plain.backward`, contiguous."""
    rows, cols = g.shape
    dx = g.new_empty(rows, cols, dtype=dtype)
    block, warps = row_block(cols)
    if rows:
        l2_normalize_bwd_kernel[(rows,)](
            g, saved, norm, dx, eps, cols, UNIT=saved_is_unit, BLOCK=block, num_warps=warps
        )
    return dx
