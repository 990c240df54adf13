"""Triton kernels of `segment_mean`: a program sums one block of columns over one segment.

The token states are read once. Normalising is a pass over the (B, H) means alone. Each segment's rows are added in
a fixed order: no atomics.
"""

# mypy: disable-error-code="no-untyped-def"
# (Triton reads the annotations of its kernels as types of its own)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..l2_normalize import kernel as l2
from ..triton_launch import on_its_device

_BLOCK_T = 32
_BLOCK_H = 128
# programs of the backward along the tokens of one segment
_SPLIT = 4


@triton.jit(do_not_specialize=["T"])
def segment_mean_fwd_kernel(
    hidden_ptr,  # (T, H)
    start_ptr,  # (B,) i64
    stop_ptr,  # (B,) i64
    mean_ptr,  # (B, H) f32
    T,
    H,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    segment = tl.program_id(0).to(tl.int64)
    offs_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    first = tl.load(start_ptr + segment)
    last = tl.load(stop_ptr + segment)
    # lengths that do not fit T give a wrong mean, and never a read out of bounds
    low = tl.maximum(first, 0)
    high = tl.minimum(last, T)
    total = tl.zeros((BLOCK_T, BLOCK_H), dtype=tl.float32)
    for chunk in range(low, high, BLOCK_T):
        offs_t = chunk + tl.arange(0, BLOCK_T).to(tl.int64)
        mask = (offs_t[:, None] < high) & (offs_h[None, :] < H)
        total += tl.load(hidden_ptr + offs_t[:, None] * H + offs_h[None, :], mask=mask, other=0.0).to(
            tl.float32
        )
    mean = tl.sum(total, axis=0) / (last - first).to(tl.float32)
    tl.store(mean_ptr + segment * H + offs_h, mean, mask=offs_h < H)


@triton.jit(do_not_specialize=["T"])
def segment_mean_bwd_kernel(
    g_ptr,  # (B, H) f32
    start_ptr,  # (B,) i64
    stop_ptr,  # (B,) i64
    edge_ptr,  # (B + 1,) i64
    out_ptr,  # (T, H)
    T,
    H,
    SPLIT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    segment = tl.program_id(0).to(tl.int64)
    offs_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    first = tl.load(start_ptr + segment)
    last = tl.load(stop_ptr + segment)
    low = tl.maximum(tl.load(edge_ptr + segment), 0)
    high = tl.minimum(tl.load(edge_ptr + segment + 1), T)
    g = tl.load(g_ptr + segment * H + offs_h, mask=offs_h < H, other=0.0) / (last - first).to(tl.float32)
    for chunk in range(low + tl.program_id(2) * BLOCK_T, high, SPLIT * BLOCK_T):
        offs_t = chunk + tl.arange(0, BLOCK_T).to(tl.int64)
        inside = (offs_t >= first) & (offs_t < last)
        value = tl.where(inside[:, None], g[None, :], 0.0)
        mask = (offs_t[:, None] < high) & (offs_h[None, :] < H)
        tl.store(
            out_ptr + offs_t[:, None] * H + offs_h[None, :], value.to(out_ptr.dtype.element_ty), mask=mask
        )


@on_its_device
def forward(
    hidden: Tensor, start: Tensor, stop: Tensor, cu_seqlens: Tensor, normalize: bool, eps: float
) -> tuple[Tensor, Tensor]:
    """Returns the means (B, H) fp32 and their norms (B,) or (0,); arguments as in `plain`, hidden contiguous."""
    tokens, width = hidden.shape
    segments = start.shape[0]
    mean = hidden.new_empty(segments, width, dtype=torch.float32)
    segment_mean_fwd_kernel[(segments, triton.cdiv(width, _BLOCK_H))](
        hidden, start, stop, mean, tokens, width, BLOCK_T=_BLOCK_T, BLOCK_H=_BLOCK_H, num_warps=4
    )
    if not normalize:
        return mean, mean.new_empty(0)
    return l2.forward(mean, torch.float32, eps)


@on_its_device
def backward(
    g: Tensor,
    unit: Tensor,
    norm: Tensor,
    start: Tensor,
    stop: Tensor,
    cu_seqlens: Tensor,
    tokens: int,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """Returns the gradient (T, H) of the token states; arguments as in `plain`, contiguous."""
    segments, width = g.shape
    if norm.numel():
        g = l2.backward(g, unit, norm, eps, True, torch.float32)
    out = g.new_empty(tokens, width, dtype=dtype)
    segment_mean_bwd_kernel[(segments, triton.cdiv(width, _BLOCK_H), _SPLIT)](
        g, start, stop, cu_seqlens, out, tokens, width,
        SPLIT=_SPLIT, BLOCK_T=_BLOCK_T, BLOCK_H=_BLOCK_H, num_warps=4,
    )  # fmt: skip
    return out
