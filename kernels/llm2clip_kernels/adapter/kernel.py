"""Triton kernels of the adapter's row operations, and the functions that launch them; arguments as in `plain`.

LayerNorm: a program holds a row in registers. Sums over rows: every program owns a group of rows and its own row of
a slab, which torch adds in a fixed order: no atomics, the same bits every run. All arithmetic is fp32.
"""

# mypy: disable-error-code="no-untyped-def"
# (Triton reads the annotations of its kernels as types of its own)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import dropout
from ..triton_dropout import keeps
from ..triton_launch import on_its_device

# of a row held in registers, sixteen elements a thread
LARGEST_ROW = 16384
# rows of a slab of partial column sums, at most
_PROGRAMS = 256
# tile of the element-wise kernels, and the rows that one program of the backward walks over
_TILE_M = 8
_TILE_N = 256
_GROUP_M = 64


@triton.jit
def layer_norm_fwd_kernel(
    x_ptr,  # (N, D)
    weight_ptr,  # (D,) f32
    bias_ptr,  # (D,) f32
    out_ptr,  # (N, D), any dtype
    eps,
    D,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    inside = col < D
    x = tl.load(x_ptr + row * D + col, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(x, axis=0) / D
    centred = tl.where(inside, x - mean, 0.0)
    value = centred / tl.sqrt(tl.sum(centred * centred, axis=0) / D + eps)
    if WEIGHT:
        value *= tl.load(weight_ptr + col, mask=inside, other=0.0)
    if BIAS:
        value += tl.load(bias_ptr + col, mask=inside, other=0.0)
    tl.store(out_ptr + row * D + col, value.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["N", "group"])
def layer_norm_bwd_kernel(
    x_ptr,  # (N, D)
    weight_ptr,  # (D,) f32
    bias_ptr,  # (D,) f32
    dh_ptr,  # (N, D); becomes LayerNorm's output where OUTPUT
    dy_ptr,  # (N, D), dtype of x
    dx_ptr,  # (N, D), dtype of x
    dweight_ptr,  # (programs, D) f32
    dbias_ptr,  # (programs, D) f32
    dy_sum_ptr,  # (programs, D) f32
    eps,
    N,
    D,
    group,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    OUTPUT: tl.constexpr,
    NEED_X: tl.constexpr,
    NEED_WEIGHT: tl.constexpr,
    NEED_BIAS: tl.constexpr,
    NEED_SUM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    inside = col < D
    dweight = tl.zeros((BLOCK,), dtype=tl.float32)
    dbias = tl.zeros((BLOCK,), dtype=tl.float32)
    dy_sum = tl.zeros((BLOCK,), dtype=tl.float32)
    for row in range(program * group, tl.minimum((program + 1) * group, N)):
        x = tl.load(x_ptr + row * D + col, mask=inside, other=0.0).to(tl.float32)
        mean = tl.sum(x, axis=0) / D
        centred = tl.where(inside, x - mean, 0.0)
        rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / D + eps)
        unit = centred * rstd
        g = tl.load(dh_ptr + row * D + col, mask=inside, other=0.0).to(tl.float32)
        if NEED_WEIGHT:
            dweight += g * unit
        if NEED_BIAS:
            dbias += g
        if WEIGHT:
            weight = tl.load(weight_ptr + col, mask=inside, other=0.0)
        if OUTPUT:
            h = unit
            if WEIGHT:
                h = h * weight
            if BIAS:
                h += tl.load(bias_ptr + col, mask=inside, other=0.0)
            tl.store(dh_ptr + row * D + col, h.to(dh_ptr.dtype.element_ty), mask=inside)
        if RESIDUAL:
            dy = tl.load(dy_ptr + row * D + col, mask=inside, other=0.0).to(tl.float32)
            if NEED_SUM:
                dy_sum += dy
        if NEED_X:
            if WEIGHT:
                g = g * weight
            dx = (g - tl.sum(g, axis=0) / D - unit * (tl.sum(g * unit, axis=0) / D)) * rstd
            if RESIDUAL:
                dx += dy
            tl.store(dx_ptr + row * D + col, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    if NEED_WEIGHT:
        tl.store(dweight_ptr + program * D + col, dweight, mask=inside)
    if NEED_BIAS:
        tl.store(dbias_ptr + program * D + col, dbias, mask=inside)
    if NEED_SUM:
        tl.store(dy_sum_ptr + program * D + col, dy_sum, mask=inside)


@triton.jit(do_not_specialize=["N", "threshold"])
def bias_gelu_fwd_kernel(
    pre_ptr,  # (N, K)
    bias_ptr,  # (K,) f32
    seed_ptr,  # one i64
    out_ptr,  # (N, K), may be pre
    threshold,
    scale,
    N,
    K,
    BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * TILE_M + tl.arange(0, TILE_M)
    cols = tl.program_id(1) * TILE_N + tl.arange(0, TILE_N)
    inside = (rows[:, None] < N) & (cols[None, :] < K)
    at = rows[:, None] * K + cols[None, :]
    v = tl.load(pre_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        v += tl.load(bias_ptr + cols, mask=cols < K, other=0.0)[None, :]
    value = v * (0.5 + 0.5 * tl.math.erf(v * 0.7071067811865476))
    if DROPOUT:
        value *= tl.where(keeps(seed_ptr, rows[:, None], cols[None, :], threshold), scale, 0.0)
    tl.store(out_ptr + at, value.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["N", "threshold"])
def bias_gelu_bwd_kernel(
    pre_ptr,  # (N, K)
    bias_ptr,  # (K,) f32
    seed_ptr,  # one i64
    gradient_ptr,  # (N, K), replaced
    out_ptr,  # (N, K): the GELU's output again
    dbias_ptr,  # (programs along the rows, K) f32
    threshold,
    scale,
    N,
    K,
    BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
    OUTPUT: tl.constexpr,
    NEED_BIAS: tl.constexpr,
    GROUP_M: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * TILE_N + tl.arange(0, TILE_N)
    total = tl.zeros((TILE_N,), dtype=tl.float32)
    if BIAS:
        bias = tl.load(bias_ptr + cols, mask=cols < K, other=0.0)[None, :]
    for step in range(0, GROUP_M, TILE_M):
        rows = program * GROUP_M + step + tl.arange(0, TILE_M)
        inside = (rows[:, None] < N) & (cols[None, :] < K)
        at = rows[:, None] * K + cols[None, :]
        v = tl.load(pre_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if BIAS:
            v += bias
        below = 0.5 + 0.5 * tl.math.erf(v * 0.7071067811865476)
        density = 0.3989422804014327 * tl.exp(-0.5 * v * v)
        g = tl.load(gradient_ptr + at, mask=inside, other=0.0).to(tl.float32)
        value = v * below
        if DROPOUT:
            factor = tl.where(keeps(seed_ptr, rows[:, None], cols[None, :], threshold), scale, 0.0)
            g *= factor
            value *= factor
        g *= below + v * density
        tl.store(gradient_ptr + at, g.to(gradient_ptr.dtype.element_ty), mask=inside)
        if OUTPUT:
            tl.store(out_ptr + at, value.to(out_ptr.dtype.element_ty), mask=inside)
        if NEED_BIAS:
            total += tl.sum(tl.where(inside, g, 0.0), axis=0)
    if NEED_BIAS:
        tl.store(dbias_ptr + program * K + cols, total, mask=cols < K)


def row_block(cols: int) -> tuple[int, int]:
    """Returns the block that holds a row of `cols` elements, and its warps."""
    block = max(16, triton.next_power_of_2(cols))
    return block, min(32, max(1, block // 512))


def _dropout(p: float) -> tuple[int, float]:
    return dropout.threshold(p), 1 / (1 - p) if p < 1 else 0.0


@on_its_device
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """As `plain.layer_norm`; x contiguous, D <= LARGEST_ROW."""
    rows, cols = x.shape
    out = x.new_empty(rows, cols, dtype=dtype)
    block, warps = row_block(cols)
    if rows:
        layer_norm_fwd_kernel[(rows,)](
            x, weight, bias, out, eps, cols,
            WEIGHT=weight.numel() > 0, BIAS=bias.numel() > 0, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return out


@on_its_device
def layer_norm_backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dh: Tensor,
    dy: Tensor,
    keep_output: bool,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
    need_dy_sum: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `plain.layer_norm_backward`; everything contiguous, D <= LARGEST_ROW."""
    rows, cols = x.shape
    residual = dy.numel() > 0
    group = max(1, triton.cdiv(rows, _PROGRAMS))
    programs = triton.cdiv(rows, group)
    wanted = need_weight, need_bias, need_dy_sum and residual
    slabs = [x.new_empty(programs if want else 0, cols, dtype=torch.float32) for want in wanted]
    dx = x.new_empty(rows if need_x else 0, cols)
    block, warps = row_block(cols)
    if rows:
        layer_norm_bwd_kernel[(programs,)](
            x, weight, bias, dh, dy, dx, *slabs, eps, rows, cols, group,
            WEIGHT=weight.numel() > 0, BIAS=bias.numel() > 0, RESIDUAL=residual, OUTPUT=keep_output, NEED_X=need_x,
            NEED_WEIGHT=wanted[0], NEED_BIAS=wanted[1], NEED_SUM=wanted[2], BLOCK=block, num_warps=warps,
        )  # fmt: skip
    sums = [slab.sum(0) if want else slab.new_empty(0) for slab, want in zip(slabs, wanted, strict=True)]
    return dx, sums[0], sums[1], sums[2]


@on_its_device
def bias_gelu(pre: Tensor, bias: Tensor, seed: Tensor, p: float, out: Tensor) -> None:
    """As `plain.bias_gelu`; everything contiguous."""
    rows, cols = pre.shape
    if rows:
        bias_gelu_fwd_kernel[(triton.cdiv(rows, _TILE_M), triton.cdiv(cols, _TILE_N))](
            pre, bias, seed, out, *_dropout(p), rows, cols,
            BIAS=bias.numel() > 0, DROPOUT=p > 0, TILE_M=_TILE_M, TILE_N=_TILE_N, num_warps=4,
        )  # fmt: skip


@on_its_device
def bias_gelu_backward(
    pre: Tensor, bias: Tensor, seed: Tensor, p: float, gradient: Tensor, keep_output: bool, need_bias: bool
) -> tuple[Tensor, Tensor]:
    """As `plain.bias_gelu_backward`; everything contiguous."""
    rows, cols = pre.shape
    programs = triton.cdiv(rows, _GROUP_M)
    out = pre.new_empty(rows if keep_output else 0, cols)
    slab = pre.new_empty(programs if need_bias else 0, cols, dtype=torch.float32)
    if rows:
        bias_gelu_bwd_kernel[(programs, triton.cdiv(cols, _TILE_N))](
            pre, bias, seed, gradient, out, slab, *_dropout(p), rows, cols,
            BIAS=bias.numel() > 0, DROPOUT=p > 0, OUTPUT=keep_output, NEED_BIAS=need_bias,
            GROUP_M=_GROUP_M, TILE_M=_TILE_M, TILE_N=_TILE_N, num_warps=4,
        )  # fmt: skip
    return out, slab.sum(0) if need_bias else slab.new_empty(0)
