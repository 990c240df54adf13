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

from ..stripes import add_stripe_gradients, gradient_unit
from ..triton_launch import on_its_device
from ..triton_tiles import group_codes, operands, precision, product_tile
from ..tuning import Config, config_for, tuned
from .chunked import gradient_lift

_STRIPE_BYTES = 256 * 2**20
# offsets within a tile of up to 256 rows are 32-bit
_MOST_COLUMNS = 2**31 // 256 - 256


@triton.jit
def log1p_of_unit(e):
    """log(1 + e) for e in [0, 1] within 2 ulp; csrc/simd/log1p.h says where the polynomial is from."""
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


@triton.jit(do_not_specialize=["M", "start", "stop", "diagonal"])
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
    dscale_ptr,  # (tiles of the stripe,) f32: partial sums of G·dot
    dbias_ptr,  # (tiles of the stripe,) f32: partial sums of G
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
    # 64 bits only for where the tile begins: 64-bit numbers for each of its elements would fill the registers
    start_m, start_n = start + i_m * BLOCK_M, i_n * BLOCK_N
    rows, cols = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    in_m = rows < (stop - start_m).to(tl.int32)
    in_n = cols < (N - start_n).to(tl.int32)
    inside = in_m[:, None] & in_n[None, :]
    dots = product_tile(x_ptr, y_ptr, start_m, start_n, M, N, D, TMA, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
    t = dots * tl.load(scale_ptr) + tl.load(bias_ptr)
    if GROUPS:
        mine = tl.load(x_code_ptr + start_m + rows, mask=in_m, other=-1)
        others = tl.load(y_code_ptr + start_n + cols, mask=in_n, other=-2)
    else:
        # a row's own column within this tile
        mine = rows + (start_m + diagonal - start_n).to(tl.int32)
        others = cols
    positive = mine[:, None] == others[None, :]
    # every pair is a negative of logit z: softplus(z), derivative sigmoid(z); z = -t for a positive one, so that
    # neither is the difference of two larger numbers
    z = tl.where(positive, -t, t)
    e = tl.exp(tl.where(z < 0.0, z, -z))
    loss = tl.where(z < 0.0, 0.0, z) + log1p_of_unit(e)
    p_loss = loss_ptr + i_n * (stop - start) + i_m * BLOCK_M + rows
    tl.store(p_loss, tl.sum(tl.where(inside, loss, 0.0), axis=1), mask=in_m)
    if STRIPE or SCALE or BIAS:
        reciprocal = 1.0 / (1.0 + e)
        g = tl.where(z < 0.0, e * reciprocal, reciprocal)
        g = tl.where(positive, -g, g)
        if WEIGHTS:
            g = g * tl.load(weight_ptr + start_m + rows, mask=in_m, other=0.0)[:, None]
        tile = i_m * tl.num_programs(0) + i_n
        if SCALE:
            total = tl.sum(tl.sum(tl.where(inside, g * dots, 0.0), axis=1), axis=0)
            tl.store(dscale_ptr + tile, total)
        if BIAS:
            total = tl.sum(tl.sum(tl.where(inside, g, 0.0), axis=1), axis=0)
            tl.store(dbias_ptr + tile, total)
        if STRIPE:
            p_stripe = stripe_ptr + i_m * BLOCK_M * N + start_n + (rows[:, None] * N + cols[None, :])
            tl.store(p_stripe, (g * LIFT).to(stripe_ptr.dtype.element_ty), mask=inside)


@on_its_device
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
    if n > _MOST_COLUMNS:
        raise ValueError(f"sigmoid_loss: at most {_MOST_COLUMNS} rows of y on a GPU, got {n}; split y")
    grouped, codes = x_groups.numel() > 0, group_codes(x_groups, y_groups)
    stripes = need_x or need_y
    unit = torch.ones_like(scale) if weight is None else gradient_unit(weight)
    lift = gradient_lift(x.dtype)
    weights = x.new_empty(0, dtype=torch.float32) if weight is None else weight / unit
    # whole tiles, so that only the last stripe is ragged
    block_m = config_for(x).block_m
    step = min(m, max(1, _STRIPE_BYTES // (x.element_size() * n) // block_m) * block_m)
    stripe_buffer = x.new_empty(step if stripes else 0, n)

    def write_stripe(config: Config, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
        *operand, tma = operands(x, y, config)
        grid = (triton.cdiv(n, config.block_n), triton.cdiv(stop - start, config.block_m))
        slab = x.new_empty(grid[0], stop - start, dtype=torch.float32)
        dscale, dbias = (
            x.new_empty(grid[0] * grid[1] if need else 0, dtype=torch.float32)
            for need in (need_scale, need_bias)
        )
        sigmoid_loss_kernel_stripe[grid](
            *operand, scale, bias, weights, *codes, stripe_buffer, slab, dscale, dbias,
            start, stop, diagonal, m, n, d,
            TMA=tma, GROUPS=grouped, WEIGHTS=weight is not None, STRIPE=stripes, SCALE=need_scale, BIAS=need_bias,
            LIFT=lift, PRECISION=precision(x),
            **config.options(),
        )  # fmt: skip
        return slab.sum(0), dscale.sum(), dbias.sum()

    config = tuned("sigmoid_loss_stripe", x, lambda config: write_stripe(config, 0, step))
    loss = x.new_empty(m, dtype=torch.float32)
    dx = x.new_empty(m if need_x else 0, d, dtype=torch.float32)
    dy = x.new_empty(n if need_y else 0, d, dtype=torch.float32)
    dscale, dbias = (x.new_zeros(1 if need else 0, dtype=torch.float32) for need in (need_scale, need_bias))
    for start in range(0, m, step):
        stop = min(start + step, m)
        loss[start:stop], scale_part, bias_part = write_stripe(config, start, stop)
        # nothing is added where they are empty
        dscale += scale_part
        dbias += bias_part
        dy = add_stripe_gradients(stripe_buffer[: stop - start], start, x, y, dx, dy)
    factor = scale * unit / lift
    return loss, dx.mul_(factor), dy.mul_(factor), dscale * unit, dbias * unit
