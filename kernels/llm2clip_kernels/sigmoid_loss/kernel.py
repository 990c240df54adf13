"""The Triton kernel of the sigmoid loss, and the function that launches it.

One kernel makes the tile t = scale · x yᵀ + bias, its loss, and a stripe of G = dL/dt in the inputs' dtype, which the
library GEMM then multiplies with y and x: 3 matmuls, one exponential per pair, no second sweep. Every tile has its own
place in the slabs of partial sums, added afterwards in a fixed order: no atomics, bitwise the same every run, and the
host never waits.

Memory: a stripe of G of `_STRIPE_BYTES`, and a float per row of the stripe and tile column.
"""

# mypy: disable-error-code="no-untyped-def"
# (Triton reads the annotations of its kernels as types of its own)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..stripes import gradient_unit, matmul
from ..triton_tiles import config_for, group_codes, operands, precision, product_tile
from .chunked import gradient_lift

_STRIPE_BYTES = 256 * 2**20


@triton.jit
def log1p_of_unit(e):
    """log(1 + e) for e in [0, 1] within 2 ulp; csrc/simd_log1p.h says where the polynomial is from."""
    # log(1 + e) itself would lose e = 5e-5, an untrained negative, to the rounding of 1 + e
    p = 0.005232689902186394
    p = p * e - 0.02950521931052208
    p = p * e + 0.07822591811418533
    p = p * e - 0.13663242757320404
    p = p * e + 0.19106005132198334
    p = p * e - 0.2484298199415207
    p = p * e + 0.3331909775733948
    p = p * e - 0.4999949336051941
    p = p * e + 0.9999999403953552
    return p * e


@triton.jit(do_not_specialize=["M", "first_tile", "start", "stop", "diagonal"])
def sigmoid_loss_kernel_stripe(
    x_ptr,  # (M, D), or its descriptor
    y_ptr,  # (N, D), or its descriptor
    scale_ptr,  # () f32
    bias_ptr,  # () f32
    weight_ptr,  # (M,) f32
    x_code_ptr,  # (M,) i32, groups
    y_code_ptr,  # (N,) i32
    stripe_ptr,  # (stop - start, N), dtype of x: LIFT · G
    loss_ptr,  # (tiles along n, stop - start) f32: sums over a tile's columns
    dscale_ptr,  # (all tiles of all stripes,) f32: partial sums of G·dot
    dbias_ptr,  # (all tiles of all stripes,) f32: partial sums of G
    first_tile,
    start,
    stop,
    diagonal,
    M,
    N,
    D,
    TMA: tl.constexpr,
    GROUPS: tl.constexpr,
    WEIGHTS: tl.constexpr,
    STRIPE: tl.constexpr,
    SCALE: tl.constexpr,
    BIAS: tl.constexpr,
    LIFT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    i_n = tl.program_id(0).to(tl.int64)
    i_m = tl.program_id(1).to(tl.int64)
    local_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_m = start + local_m
    offs_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    in_m = offs_m < stop
    in_n = offs_n < N
    inside = in_m[:, None] & in_n[None, :]
    dots = product_tile(
        x_ptr, y_ptr, start + i_m * BLOCK_M, i_n * BLOCK_N, M, N, D, TMA, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K
    )
    t = dots * tl.load(scale_ptr) + tl.load(bias_ptr)
    if GROUPS:
        mine = tl.load(x_code_ptr + offs_m, mask=in_m, other=-1)
        others = tl.load(y_code_ptr + offs_n, mask=in_n, other=-2)
    else:
        # columns fit 32 bits, and two-dimensional 64-bit numbers would not fit the registers
        mine = (offs_m + diagonal).to(tl.int32)
        others = offs_n.to(tl.int32)
    positive = mine[:, None] == others[None, :]
    # every pair is a negative of logit z: softplus(z), derivative sigmoid(z); z = -t for a positive one, so that
    # neither is the difference of two larger numbers
    z = tl.where(positive, -t, t)
    e = tl.exp(tl.where(z < 0.0, z, -z))
    loss = tl.where(z < 0.0, 0.0, z) + log1p_of_unit(e)
    p_loss = loss_ptr + i_n * (stop - start) + local_m
    tl.store(p_loss, tl.sum(tl.where(inside, loss, 0.0), axis=1), mask=in_m)
    if STRIPE or SCALE or BIAS:
        reciprocal = 1.0 / (1.0 + e)
        g = tl.where(z < 0.0, e * reciprocal, reciprocal)
        g = tl.where(positive, -g, g)
        if WEIGHTS:
            g = g * tl.load(weight_ptr + offs_m, mask=in_m, other=0.0)[:, None]
        tile = first_tile + i_m * tl.num_programs(0) + i_n
        if SCALE:
            total = tl.sum(tl.sum(tl.where(inside, g * dots, 0.0), axis=1), axis=0)
            tl.store(dscale_ptr + tile, total)
        if BIAS:
            total = tl.sum(tl.sum(tl.where(inside, g, 0.0), axis=1), axis=0)
            tl.store(dbias_ptr + tile, total)
        if STRIPE:
            p_stripe = stripe_ptr + local_m[:, None] * N + offs_n[None, :]
            tl.store(p_stripe, (g * LIFT).to(stripe_ptr.dtype.element_ty), mask=inside)


def compute(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    x_groups: Tensor,
    y_groups: Tensor,
    diagonal: int,
    weight: Tensor | None,
    need_x: bool,
    need_y: bool,
    need_scale: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Arguments and results as in `chunked.compute`; x and y contiguous, of one dtype of fp32, bf16, fp16."""
    m, n, d = x.shape[0], y.shape[0], x.shape[1]
    config = config_for(x)
    grouped, codes = x_groups.numel() > 0, group_codes(x_groups, y_groups)
    stripes = need_x or need_y
    unit = torch.ones_like(scale) if weight is None else gradient_unit(weight)
    lift = gradient_lift(x.dtype)
    nothing = x.new_empty(0, dtype=torch.float32)
    # whole tiles, so that only the last stripe is ragged
    step = max(1, _STRIPE_BYTES // (x.element_size() * n) // config.block_m) * config.block_m
    step = min(step, m)
    tiles_n = triton.cdiv(n, config.block_n)
    # a ragged stripe rounds its tiles up
    tiles = sum(triton.cdiv(min(step, m - start), config.block_m) for start in range(0, m, step)) * tiles_n
    stripe_buffer = x.new_empty(step if stripes else 0, n)
    loss = x.new_empty(m, dtype=torch.float32)
    dx = x.new_empty(m if need_x else 0, d, dtype=torch.float32)
    dy = x.new_empty(n if need_y else 0, d, dtype=torch.float32)
    dscale = x.new_empty(tiles if need_scale else 0, dtype=torch.float32)
    dbias = x.new_empty(tiles if need_bias else 0, dtype=torch.float32)
    *operand, tma = operands(x, y, config)
    first_tile = 0
    for start in range(0, m, step):
        stop = min(start + step, m)
        grid = (tiles_n, triton.cdiv(stop - start, config.block_m))
        slab = x.new_empty(tiles_n, stop - start, dtype=torch.float32)
        sigmoid_loss_kernel_stripe[grid](
            *operand, scale, bias,
            nothing if weight is None else weight / unit, *codes,
            stripe_buffer, slab, dscale, dbias, first_tile, start, stop, diagonal, m, n, d,
            TMA=tma, GROUPS=grouped, WEIGHTS=weight is not None, STRIPE=stripes, SCALE=need_scale, BIAS=need_bias,
            LIFT=lift, PRECISION=precision(x),
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
        loss[start:stop] = slab.sum(0)
        stripe = stripe_buffer[: stop - start]
        if need_x:
            dx[start:stop] = matmul(stripe, y)
        if need_y:
            product = matmul(stripe.T, x[start:stop])
            dy = product if start == 0 else dy.add_(product)
        first_tile += grid[0] * grid[1]
    factor = scale * unit / lift
    return (
        loss,
        dx.mul_(factor),
        dy.mul_(factor),
        dscale.sum(0, keepdim=True)[: dscale.numel()] * unit,
        dbias.sum(0, keepdim=True)[: dbias.numel()] * unit,
    )
