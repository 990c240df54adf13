"""Triton kernels of `similarity_lse`, and the functions that launch them.

The S = scale · x yᵀ tile is made twice: once for row and column sums of exp(S - c), once for a stripe of
G = dL/dS in the inputs' dtype, which the library GEMM then multiplies with y and x. One constant shift
c = max(0, |scale|·max‖x‖·max‖y‖ - 70) serves every row and column, so there is one exp per pair and partial
sums add up. Each program owns a block of tiles and its own row of the slabs of partial sums, added afterwards
in a fixed order: no atomics, bitwise the same every run. Sums too small to trust raise a flag on the device,
and only then does the kernel with running maxima do anything; the host never waits.

Memory: slabs of at most 64·(M+N) floats, and a stripe of G of `_STRIPE_BYTES`.
"""

# mypy: disable-error-code="no-untyped-def"
# (Triton reads the annotations of its kernels as types of its own)

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import native
from ..stripes import gradient_unit, matmul
from ..triton_tiles import (
    Config,
    config_for,
    counted,
    finite,
    group_codes,
    operands,
    precision,
    product_tile,
    static_shift,
)

# log of the smallest sum, relative to the shift, whose flushed terms cannot matter: log 1e-26
_LOWEST_SUM = -59.8
# programs along one side, at most; more tiles than that are looped over
_SIDE = 64
_STRIPE_BYTES = 256 * 2**20


@triton.jit(do_not_specialize=["M", "group_m", "group_n", "diagonal"])
def similarity_lse_fwd_kernel_sums(
    x_ptr,  # (M, D)
    y_ptr,  # (N, D)
    scale_ptr,  # () f32
    shift_ptr,  # () f32
    row_slab_ptr,  # (programs along n, M) f32, zeros
    col_slab_ptr,  # (programs along m, N) f32, zeros
    x_code_ptr,  # (M,) i32, groups
    y_code_ptr,  # (N,) i32
    diagonal,
    M,
    N,
    D,
    group_m,
    group_n,
    TMA: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUPS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    i_n = tl.program_id(0).to(tl.int64)
    i_m = tl.program_id(1).to(tl.int64)
    scale = tl.load(scale_ptr)
    shift = tl.load(shift_ptr)
    for t_m in range(0, group_m):
        start_m = (i_m * group_m + t_m) * BLOCK_M
        offs_m = start_m + tl.arange(0, BLOCK_M)
        row_sum = tl.zeros((BLOCK_M,), dtype=tl.float32)
        for t_n in range(0, group_n):
            start_n = (i_n * group_n + t_n) * BLOCK_N
            offs_n = start_n + tl.arange(0, BLOCK_N)
            acc = product_tile(
                x_ptr, y_ptr, start_m, start_n, M, N, D, TMA, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K
            )
            e = tl.exp(acc * scale - shift)
            inside = (offs_m[:, None] < M) & (offs_n[None, :] < N)
            if GROUPS:
                inside &= counted(x_code_ptr, y_code_ptr, offs_m, offs_n, diagonal, M, N)
            e = tl.where(inside, e, 0.0)
            row_sum += tl.sum(e, axis=1)
            if COLUMNS:
                p_col = col_slab_ptr + i_m * N + offs_n
                total = tl.load(p_col, mask=offs_n < N, other=0.0) + tl.sum(e, axis=0)
                tl.store(p_col, total, mask=offs_n < N)
                # the next tile row of this program reads what was just written
                tl.debug_barrier()
        tl.store(row_slab_ptr + i_n * M + offs_m, row_sum, mask=offs_m < M)


@triton.jit(do_not_specialize=["M", "group_m", "group_n", "diagonal"])
def similarity_lse_fwd_kernel_online(
    x_ptr,  # (M, D)
    y_ptr,  # (N, D)
    scale_ptr,  # () f32
    flag_ptr,  # () i32, nothing happens where it is 0
    row_max_ptr,  # (programs along n, M) f32
    row_slab_ptr,  # (programs along n, M) f32, sums relative to row_max
    col_max_ptr,  # (programs along m, N) f32, -inf
    col_slab_ptr,  # (programs along m, N) f32, zeros
    x_code_ptr,  # (M,) i32, groups
    y_code_ptr,  # (N,) i32
    diagonal,
    M,
    N,
    D,
    group_m,
    group_n,
    TMA: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUPS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    if tl.load(flag_ptr) != 0:
        i_n = tl.program_id(0).to(tl.int64)
        i_m = tl.program_id(1).to(tl.int64)
        scale = tl.load(scale_ptr)
        for t_m in range(0, group_m):
            start_m = (i_m * group_m + t_m) * BLOCK_M
            offs_m = start_m + tl.arange(0, BLOCK_M)
            row_max = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
            row_sum = tl.zeros((BLOCK_M,), dtype=tl.float32)
            for t_n in range(0, group_n):
                start_n = (i_n * group_n + t_n) * BLOCK_N
                offs_n = start_n + tl.arange(0, BLOCK_N)
                acc = product_tile(
                    x_ptr, y_ptr, start_m, start_n, M, N, D, TMA, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K
                )
                inside = (offs_m[:, None] < M) & (offs_n[None, :] < N)
                if GROUPS:
                    inside &= counted(x_code_ptr, y_code_ptr, offs_m, offs_n, diagonal, M, N)
                logits = tl.where(inside, acc * scale, float("-inf"))
                new_max = tl.maximum(row_max, tl.max(logits, axis=1))
                e = tl.where(inside, tl.exp(logits - finite(new_max)[:, None]), 0.0)
                # an empty sum stays empty whatever its maximum was
                kept = tl.where(row_sum == 0.0, 0.0, row_sum * tl.exp(finite(row_max) - finite(new_max)))
                row_sum = kept + tl.sum(e, axis=1)
                row_max = new_max
                if COLUMNS:
                    in_n = offs_n < N
                    p_max = col_max_ptr + i_m * N + offs_n
                    p_sum = col_slab_ptr + i_m * N + offs_n
                    old_max = tl.load(p_max, mask=in_n, other=0.0)
                    old_sum = tl.load(p_sum, mask=in_n, other=0.0)
                    top = tl.maximum(old_max, tl.max(logits, axis=0))
                    e = tl.where(inside, tl.exp(logits - finite(top)[None, :]), 0.0)
                    kept = tl.where(old_sum == 0.0, 0.0, old_sum * tl.exp(finite(old_max) - finite(top)))
                    tl.store(p_max, top, mask=in_n)
                    tl.store(p_sum, kept + tl.sum(e, axis=0), mask=in_n)
                    tl.debug_barrier()
            tl.store(row_max_ptr + i_n * M + offs_m, row_max, mask=offs_m < M)
            tl.store(row_slab_ptr + i_n * M + offs_m, row_sum, mask=offs_m < M)


@triton.jit(do_not_specialize=["M", "first_tile", "start", "stop", "diagonal"])
def similarity_lse_bwd_kernel_stripe(
    x_ptr,  # (M, D)
    y_ptr,  # (N, D)
    scale_ptr,  # () f32
    shift_ptr,  # () f32
    flag_ptr,  # () i32
    row_factor_ptr,  # (M,) f32: g_row·exp(shift - row_lse)
    col_factor_ptr,  # (N,) f32: g_col·exp(shift - col_lse)
    g_row_ptr,  # (M,) f32
    g_col_ptr,  # (N,) f32
    g_pos_ptr,  # (M,) f32
    row_lse_ptr,  # (M,) f32
    col_lse_ptr,  # (N,) f32
    x_code_ptr,  # (M,) i32, groups
    y_code_ptr,  # (N,) i32
    stripe_ptr,  # (stop - start, N), dtype of x: G
    dscale_ptr,  # (all tiles of all stripes,) f32: partial sums of G·dot
    first_tile,
    start,
    stop,
    diagonal,
    M,
    N,
    D,
    TMA: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUPS: tl.constexpr,
    POSITIVES: tl.constexpr,
    SCALE: tl.constexpr,
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
    scale = tl.load(scale_ptr)
    dots = product_tile(
        x_ptr, y_ptr, start + i_m * BLOCK_M, i_n * BLOCK_N, M, N, D, TMA, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K
    )
    logits = dots * scale
    if tl.load(flag_ptr) == 0:
        factor = tl.load(row_factor_ptr + offs_m, mask=in_m, other=0.0)[:, None]
        if COLUMNS:
            factor = factor + tl.load(col_factor_ptr + offs_n, mask=in_n, other=0.0)[None, :]
        g = tl.exp(logits - tl.load(shift_ptr)) * factor
    else:
        row_lse = tl.load(row_lse_ptr + offs_m, mask=in_m, other=0.0)
        g_row = tl.load(g_row_ptr + offs_m, mask=in_m, other=0.0)
        g = tl.exp(logits - row_lse[:, None]) * g_row[:, None]
        if COLUMNS:
            col_lse = tl.load(col_lse_ptr + offs_n, mask=in_n, other=0.0)
            g_col = tl.load(g_col_ptr + offs_n, mask=in_n, other=0.0)
            g += tl.exp(logits - col_lse[None, :]) * g_col[None, :]
    if GROUPS:
        g = tl.where(counted(x_code_ptr, y_code_ptr, offs_m, offs_n, diagonal, M, N), g, 0.0)
    if POSITIVES:
        # before rounding: near convergence p - 1 cancels
        g_pos = tl.load(g_pos_ptr + offs_m, mask=in_m, other=0.0)
        own = (offs_m + diagonal).to(tl.int32)[:, None] == offs_n.to(tl.int32)[None, :]
        g += tl.where(own, g_pos[:, None], 0.0)
    inside = in_m[:, None] & in_n[None, :]
    if SCALE:
        total = tl.sum(tl.sum(tl.where(inside, g * dots, 0.0), axis=1), axis=0)
        tl.store(dscale_ptr + first_tile + i_m * tl.num_programs(0) + i_n, total)
    p_stripe = stripe_ptr + local_m[:, None] * N + offs_n[None, :]
    tl.store(p_stripe, g.to(stripe_ptr.dtype.element_ty), mask=inside)


def online_config(config: Config) -> Config:
    """Running maxima need more registers than plain sums; half as many columns leave room for them."""
    return replace(config, block_n=max(16, config.block_n // 2))


def _tiles(x: Tensor, y: Tensor, config: Config) -> tuple[int, int, int, int]:
    """Programs along n and m, and tiles of each program along n and m."""
    tiles_n, tiles_m = triton.cdiv(y.shape[0], config.block_n), triton.cdiv(x.shape[0], config.block_m)
    group_n, group_m = triton.cdiv(tiles_n, _SIDE), triton.cdiv(tiles_m, _SIDE)
    return triton.cdiv(tiles_n, group_n), triton.cdiv(tiles_m, group_m), group_n, group_m


def _lse_of_slabs(slabs: Tensor, shift: Tensor, flag: Tensor) -> Tensor:
    if slabs.is_cuda and native.has_cuda():
        lse: Tensor = torch.ops.llm2clip_native.lse_from_slabs(slabs, shift, flag)
        return lse
    lse = slabs.sum(0).log() + shift
    flag.logical_or_(((lse - shift >= _LOWEST_SUM) & lse.isfinite()).all().logical_not())
    return lse


def _merge_online(largest: Tensor, slabs: Tensor) -> Tensor:
    top = largest.amax(0)
    top = torch.where(top.isfinite(), top, torch.zeros_like(top))
    below = torch.where(largest.isfinite(), largest, torch.zeros_like(largest))
    return torch.where(slabs == 0, slabs, slabs * (below - top).exp()).sum(0).log() + top


def forward(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    columns: bool,
    diagonal: int,
    x_groups: Tensor,
    y_groups: Tensor,
) -> tuple[Tensor, Tensor]:
    """Returns row_lse (M,) and col_lse (N,) or (0,), fp32.

    x (M, D) and y (N, D): contiguous, one dtype of fp32, bf16, fp16; scale () fp32 on the device; groups (M,)
    and (N,) int64 or empty: pairs of equal ones are left out, except (i, diagonal + i).
    """
    m, n, d = x.shape[0], y.shape[0], x.shape[1]
    config = config_for(x)
    grouped, codes = x_groups.numel() > 0, group_codes(x_groups, y_groups)
    programs_n, programs_m, group_n, group_m = _tiles(x, y, config)
    shift, flag = static_shift(x, y, scale)
    flag = flag.reshape(1)
    grid = (programs_n, programs_m)
    blocks = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k}
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    rows = x.new_zeros(programs_n, m, dtype=torch.float32)
    cols = x.new_zeros(programs_m if columns else 0, n, dtype=torch.float32)
    *tiles, tma = operands(x, y, config)
    similarity_lse_fwd_kernel_sums[grid](
        *tiles, scale, shift, rows, cols, *codes, diagonal, m, n, d, group_m, group_n,
        TMA=tma, COLUMNS=columns, GROUPS=grouped, PRECISION=precision(x), **blocks, **options,
    )  # fmt: skip
    row_lse = _lse_of_slabs(rows, shift, flag)
    col_lse = _lse_of_slabs(cols, shift, flag) if columns else cols.new_empty(0)
    config = online_config(config)
    programs_n, programs_m, group_n, group_m = _tiles(x, y, config)
    blocks["BLOCK_N"] = config.block_n
    online_rows = x.new_zeros(programs_n, m, dtype=torch.float32)
    online_cols = x.new_zeros(programs_m if columns else 0, n, dtype=torch.float32)
    row_max, col_max = torch.full_like(online_rows, -torch.inf), torch.full_like(online_cols, -torch.inf)
    *tiles, tma = operands(x, y, config)
    similarity_lse_fwd_kernel_online[(programs_n, programs_m)](
        *tiles, scale, flag, row_max, online_rows, col_max, online_cols, *codes, diagonal,
        m, n, d, group_m, group_n,
        TMA=tma, COLUMNS=columns, GROUPS=grouped, PRECISION=precision(x), **blocks, **options,
    )  # fmt: skip
    raised = flag != 0
    row_lse = torch.where(raised, _merge_online(row_max, online_rows), row_lse)
    if columns:
        col_lse = torch.where(raised, _merge_online(col_max, online_cols), col_lse)
    return row_lse, col_lse


def backward(
    g_row: Tensor,
    g_col: Tensor,
    g_pos: Tensor,
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    row_lse: Tensor,
    col_lse: Tensor,
    diagonal: int,
    x_groups: Tensor,
    y_groups: Tensor,
    need_x: bool,
    need_y: bool,
    need_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns dx (M, D), dy (N, D) and dscale, fp32, empty where not needed; arguments as in `chunked`."""
    m, n, d = x.shape[0], y.shape[0], x.shape[1]
    config = config_for(x)
    grouped, codes = x_groups.numel() > 0, group_codes(x_groups, y_groups)
    columns, positives = g_col.numel() > 0, g_pos.numel() > 0
    unit = gradient_unit(g_row, g_col, g_pos)
    g_row, g_col, g_pos = g_row / unit, g_col / unit, g_pos / unit
    shift, flag = static_shift(x, y, scale)
    safe = (row_lse - shift >= _LOWEST_SUM) & row_lse.isfinite()
    flag = flag | safe.all().logical_not()
    if columns:
        flag = flag | ((col_lse - shift >= _LOWEST_SUM) & col_lse.isfinite()).all().logical_not()
    row_factor, col_factor = g_row * (shift - row_lse).exp(), g_col * (shift - col_lse[: g_col.numel()]).exp()
    # whole tiles, so that only the last stripe is ragged
    step = max(1, _STRIPE_BYTES // (x.element_size() * n) // config.block_m) * config.block_m
    step = min(step, m)
    tiles_n = triton.cdiv(n, config.block_n)
    # a ragged stripe rounds its tiles up
    tiles = sum(triton.cdiv(min(step, m - start), config.block_m) for start in range(0, m, step)) * tiles_n
    stripe_buffer = x.new_empty(step, n)
    dscale = x.new_zeros(tiles if need_scale else 0, dtype=torch.float32)
    dx = x.new_empty(m if need_x else 0, d, dtype=torch.float32)
    dy = x.new_empty(n if need_y else 0, d, dtype=torch.float32)
    first_tile = 0
    *operand, tma = operands(x, y, config)
    for start in range(0, m, step):
        stop = min(start + step, m)
        grid = (tiles_n, triton.cdiv(stop - start, config.block_m))
        similarity_lse_bwd_kernel_stripe[grid](
            *operand, scale, shift, flag, row_factor, col_factor, g_row, g_col, g_pos, row_lse, col_lse,
            *codes, stripe_buffer, dscale, first_tile, start, stop, diagonal, m, n, d,
            TMA=tma, COLUMNS=columns, GROUPS=grouped, POSITIVES=positives, SCALE=need_scale, PRECISION=precision(x),
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
        stripe = stripe_buffer[: stop - start]
        if need_x:
            dx[start:stop] = matmul(stripe, y)
        if need_y:
            product = matmul(stripe.T, x[start:stop])
            dy = product if start == 0 else dy.add_(product)
        first_tile += grid[0] * grid[1]
    return dx.mul_(scale * unit), dy.mul_(scale * unit), dscale.sum() * unit
