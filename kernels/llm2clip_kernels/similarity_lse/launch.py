"""Launches the Triton kernels of `similarity_lse`: grids, slabs, stripes, and the library GEMMs between them.

Memory: slabs of at most 64·(M+N) floats, a stripe of G of `_STRIPE_BYTES`, and M·N·2 bytes where cached. The host
never waits for the device.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
from torch import Tensor

from .. import native
from ..checks import positive_logits
from ..stripes import add_stripe_gradients, gradient_unit
from ..triton_launch import on_its_device
from ..triton_tiles import group_codes, operands, precision, static_shift
from ..tuning import Config, config_for, tuned
from .kernel import (
    similarity_lse_bwd_kernel_cached,
    similarity_lse_bwd_kernel_stripe,
    similarity_lse_fwd_kernel_online,
    similarity_lse_fwd_kernel_sums,
)

# log of the smallest sum, relative to the shift, whose flushed terms cannot matter: log 1e-26
_LOWEST_SUM = -59.8
# programs along one side, at most; more tiles than that are looped over
_SIDE = 64
_STRIPE_BYTES = 256 * 2**20
# offsets within a tile of up to 256 rows are 32-bit
_MOST_COLUMNS = 2**31 // 256 - 256


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


@on_its_device
def forward(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    columns: bool,
    diagonal: int,
    x_groups: Tensor,
    y_groups: Tensor,
    cached: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns row_lse (M,) and col_lse (N,) or (0,), fp32, and exp(S - c) (M·N,) or (0,), bf16.

    x (M, D) and y (N, D): contiguous, one dtype of fp32, bf16, fp16; scale () fp32 on the device; groups (M,)
    and (N,) int64 or empty: pairs of equal ones are left out, except (i, diagonal + i).
    """
    m, n, d = x.shape[0], y.shape[0], x.shape[1]
    grouped, codes = x_groups.numel() > 0, group_codes(x_groups, y_groups)
    shift, flag = static_shift(x, y, scale)
    flag = flag.reshape(1)
    cache = x.new_empty(m * n if cached else 0, dtype=torch.bfloat16)

    def sums(config: Config) -> tuple[Tensor, Tensor]:
        programs_n, programs_m, group_n, group_m = _tiles(x, y, config)
        rows = x.new_zeros(programs_n, m, dtype=torch.float32)
        cols = x.new_zeros(programs_m if columns else 0, n, dtype=torch.float32)
        *tiles, tma = operands(x, y, config)
        similarity_lse_fwd_kernel_sums[(programs_n, programs_m)](
            *tiles, scale, shift, rows, cols, cache, *codes, diagonal, m, n, d, group_m, group_n,
            TMA=tma, COLUMNS=columns, GROUPS=grouped, CACHE=cached, PRECISION=precision(x),
            **config.options(),
        )  # fmt: skip
        return rows, cols

    config = tuned("similarity_lse_sums", x, sums)
    rows, cols = sums(config)
    row_lse = _lse_of_slabs(rows, shift, flag)
    col_lse = _lse_of_slabs(cols, shift, flag) if columns else cols.new_empty(0)
    config = online_config(config_for(x))
    programs_n, programs_m, group_n, group_m = _tiles(x, y, config)
    online_rows = x.new_zeros(programs_n, m, dtype=torch.float32)
    online_cols = x.new_zeros(programs_m if columns else 0, n, dtype=torch.float32)
    row_max, col_max = torch.full_like(online_rows, -torch.inf), torch.full_like(online_cols, -torch.inf)
    *tiles, tma = operands(x, y, config)
    similarity_lse_fwd_kernel_online[(programs_n, programs_m)](
        *tiles, scale, flag, row_max, online_rows, col_max, online_cols, *codes, diagonal,
        m, n, d, group_m, group_n,
        TMA=tma, COLUMNS=columns, GROUPS=grouped, PRECISION=precision(x),
        **config.options(),
    )  # fmt: skip
    raised = flag != 0
    row_lse = torch.where(raised, _merge_online(row_max, online_rows), row_lse)
    if columns:
        col_lse = torch.where(raised, _merge_online(col_max, online_cols), col_lse)
    return row_lse, col_lse, cache


@on_its_device
def backward(
    g_row: Tensor,
    g_col: Tensor,
    g_pos: Tensor,
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    row_lse: Tensor,
    col_lse: Tensor,
    cache: Tensor,
    diagonal: int,
    x_groups: Tensor,
    y_groups: Tensor,
    need_x: bool,
    need_y: bool,
    need_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns dx (M, D), dy (N, D) and dscale, fp32, empty where not needed; arguments as in `chunked`.

    cache: (M·N,) from `forward`, or (0,).
    """
    m, n, d = x.shape[0], y.shape[0], x.shape[1]
    if n > _MOST_COLUMNS:
        raise ValueError(f"similarity_lse: at most {_MOST_COLUMNS} rows of y on a GPU, got {n}; split y")
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
    block_m = config_for(x).block_m
    step = min(m, max(1, _STRIPE_BYTES // (x.element_size() * n) // block_m) * block_m)
    stripe_buffer = x.new_empty(step, n)
    # for dscale alone the logits themselves are better
    cached = cache.numel() > 0 and (need_x or need_y)
    pos = positive_logits(x, y, scale, diagonal) if cached and positives else g_pos

    def write_stripe(config: Config, start: int, stop: int) -> Tensor:
        *operand, tma = operands(x, y, config)
        grid = (triton.cdiv(n, config.block_n), triton.cdiv(stop - start, config.block_m))
        parts = x.new_zeros(grid[0] * grid[1] if need_scale else 0, dtype=torch.float32)
        if cached:
            similarity_lse_bwd_kernel_cached[grid](
                cache, scale, shift, flag, row_factor, col_factor, g_pos, pos, stripe_buffer, parts,
                start, stop, diagonal, n,
                COLUMNS=columns, POSITIVES=positives, SCALE=need_scale,
                BLOCK_M=config.block_m, BLOCK_N=config.block_n, ROWS=min(16, config.block_m),
                num_warps=config.num_warps,
            )  # fmt: skip
        similarity_lse_bwd_kernel_stripe[grid](
            *operand, scale, shift, flag, row_factor, col_factor, g_row, g_col, g_pos, row_lse, col_lse,
            *codes, stripe_buffer, parts, start, stop, diagonal, m, n, d,
            TMA=tma, COLUMNS=columns, GROUPS=grouped, POSITIVES=positives, SCALE=need_scale,
            CACHE=cached, PRECISION=precision(x),
            **config.options(),
        )  # fmt: skip
        return parts.sum()

    config = tuned("similarity_lse_stripe", x, lambda config: write_stripe(config, 0, step))
    total = x.new_zeros((), dtype=torch.float32)
    dx = x.new_empty(m if need_x else 0, d, dtype=torch.float32)
    dy = x.new_empty(n if need_y else 0, d, dtype=torch.float32)
    for start in range(0, m, step):
        stop = min(start + step, m)
        total = total + write_stripe(config, start, stop)
        dy = add_stripe_gradients(stripe_buffer[: stop - start], start, x, y, dx, dy)
    if cached and need_scale:
        # at scale 0 every exponential is 1 and says nothing of the dot product
        direct = (x * dx).sum() if need_x else (y * dy).sum()
        total = torch.where(scale == 0, direct, total)
    return dx.mul_(scale * unit), dy.mul_(scale * unit), total * unit
