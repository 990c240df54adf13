"""Launches the kernels of `similarity_distill`: tiles, slabs, stripes, and what is made of the partial sums.

Memory: five slabs of at most 32·(M+N) floats, and a stripe of G of `_STRIPE_BYTES`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import triton
from torch import Tensor

from ..stripes import add_stripe_gradients, gradient_unit
from ..triton_launch import on_its_device
from ..triton_tiles import Config, config_for, operands, precision, static_shift
from .kernel import (
    similarity_distill_bwd_kernel_stripe,
    similarity_distill_fwd_kernel_online,
    similarity_distill_fwd_kernel_sums,
)

# log of the smallest sum, relative to the shift, whose flushed terms cannot matter: log 1e-26
_LOWEST_SUM = -59.8
# programs along one side, at most; more tiles than that are looped over
_SIDE = 32
_STRIPE_BYTES = 256 * 2**20


def distill_config(config: Config) -> Config:
    """Returns the tile for two products at a time, which are in registers together: half as wide, or half as deep."""
    if config.block_n > 32:
        return dataclasses.replace(config, block_n=config.block_n // 2)
    return dataclasses.replace(config, block_k=max(16, config.block_k // 2))


def online_config(config: Config) -> Config:
    """Returns the tile of the kernel with running maxima, whose registers would spill at the usual height."""
    return dataclasses.replace(config, block_m=max(16, config.block_m // 2))


def _tiles(x: Tensor, y: Tensor, config: Config) -> tuple[int, int, int, int]:
    """Programs along n and m, and tiles of each program along n and m."""
    tiles_n, tiles_m = triton.cdiv(y.shape[0], config.block_n), triton.cdiv(x.shape[0], config.block_m)
    group_n, group_m = triton.cdiv(tiles_n, _SIDE), triton.cdiv(tiles_m, _SIDE)
    return triton.cdiv(tiles_n, group_n), triton.cdiv(tiles_m, group_m), group_n, group_m


def _of_slabs(
    slabs: Tensor, shift: Tensor, teacher_shift: Tensor, origin: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-sum-exp of S, cross term, log-sum-exp of T, and whether they can be trusted."""
    student, teacher, cross = slabs[:3].sum(1)
    lse, teacher_lse = student.log(), teacher.log()
    average = cross / teacher + origin
    good = (lse >= _LOWEST_SUM) & lse.isfinite() & (teacher_lse >= _LOWEST_SUM) & teacher_lse.isfinite()
    return lse + shift, average, teacher_lse + teacher_shift, (good & average.isfinite()).all()


def _of_online_slabs(slabs: Tensor, origin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    def below(largest: Tensor) -> tuple[Tensor, Tensor]:
        top = largest.amax(0)
        top = torch.where(top.isfinite(), top, torch.zeros_like(top))
        return top, (torch.where(largest.isfinite(), largest, torch.zeros_like(largest)) - top).exp()

    def total(sums: Tensor, factor: Tensor) -> Tensor:
        return torch.where(sums == 0, sums, sums * factor).sum(0)

    top, factor = below(slabs[3])
    teacher_top, teacher_factor = below(slabs[4])
    teacher = total(slabs[1], teacher_factor)
    return (
        total(slabs[0], factor).log() + top,
        total(slabs[2], teacher_factor) / teacher + origin,
        teacher.log() + teacher_top,
    )


@on_its_device
def forward(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    p: Tensor,
    q: Tensor,
    teacher_scale: Tensor,
    columns: bool,
    row_origin: Tensor,
    col_origin: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns row_lse, col_lse, cross_row, cross_col, teacher_row_lse, teacher_col_lse, fp32, as `chunked.forward`.

    All inputs contiguous; x and y of one dtype of fp32, bf16, fp16, p and q of another; the rest fp32.
    """
    m, n, d, e = x.shape[0], y.shape[0], x.shape[1], p.shape[1]
    config = distill_config(config_for(x if x.element_size() >= p.element_size() else p))
    shift, flag = static_shift(x, y, scale)
    teacher_shift, teacher_flag = static_shift(p, q, teacher_scale)
    buffers = [x.new_empty(5 * _SIDE * k, dtype=torch.float32) for k in (m, n if columns else 0)]

    def launch(kernel: Any, config: Config, *constants: Tensor) -> list[Tensor]:
        programs_n, programs_m, group_n, group_m = _tiles(x, y, config)
        # both kernels use the same memory, the second when the sums of the first have been read
        sides = zip(buffers, (programs_n, programs_m), strict=True)
        slabs = [b[: b.numel() // _SIDE * programs].view(5, programs, -1) for b, programs in sides]
        *student, tma = operands(x, y, config)
        *teacher, teacher_tma = operands(p, q, config)
        kernel[(programs_n, programs_m)](
            *student, *teacher, scale, teacher_scale, *constants, row_origin, col_origin, *slabs,
            m, n, d, e, group_m, group_n,
            TMA=tma, TEACHER_TMA=teacher_tma, COLUMNS=columns, PRECISION=precision(x),
            TEACHER_PRECISION=precision(p),
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
        return slabs

    rows, cols = launch(similarity_distill_fwd_kernel_sums, config, shift, teacher_shift)
    row_lse, cross_row, teacher_row, trusted = _of_slabs(rows, shift, teacher_shift, row_origin)
    none = cols.new_empty(0)
    col_lse, cross_col, teacher_col = none, none, none
    if columns:
        col_lse, cross_col, teacher_col, good = _of_slabs(cols, shift, teacher_shift, col_origin)
        trusted = trusted & good
    raised = (flag != 0) | (teacher_flag != 0) | trusted.logical_not()
    rows, cols = launch(similarity_distill_fwd_kernel_online, online_config(config), raised.to(torch.int32))

    def select(slabs: Tensor, origin: Tensor, results: tuple[Tensor, ...]) -> list[Tensor]:
        online = _of_online_slabs(slabs, origin)
        return [torch.where(raised, a, b) for a, b in zip(online, results, strict=True)]

    row_lse, cross_row, teacher_row = select(rows, row_origin, (row_lse, cross_row, teacher_row))
    if columns:
        col_lse, cross_col, teacher_col = select(cols, col_origin, (col_lse, cross_col, teacher_col))
    return row_lse, col_lse, cross_row, cross_col, teacher_row, teacher_col


def _factors(
    g_row: Tensor, g_col: Tensor, row_lse: Tensor, col_lse: Tensor, shift: Tensor, unit: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Factors, gradients and log-sum-exps as `weighted` reads them, and whether the factors can be trusted."""
    gradient = torch.cat([g_row, g_col]) / unit
    lse = torch.cat([row_lse, col_lse[: g_col.numel()]])
    trusted = ((lse - shift >= _LOWEST_SUM) & lse.isfinite()).all()
    factor = torch.cat([shift.reshape(1), gradient * (shift - lse).exp()])
    return factor, gradient, lse, trusted


@on_its_device
def backward(
    g_row: Tensor,
    g_col: Tensor,
    g_pos: Tensor,
    g_cross_row: Tensor,
    g_cross_col: Tensor,
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    p: Tensor,
    q: Tensor,
    teacher_scale: Tensor,
    row_lse: Tensor,
    col_lse: Tensor,
    teacher_row: Tensor,
    teacher_col: Tensor,
    diagonal: int,
    need_x: bool,
    need_y: bool,
    need_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns dx (M, D), dy (N, D) and dscale, fp32, empty where not needed; arguments as in `chunked.backward`."""
    m, n, d, e = x.shape[0], y.shape[0], x.shape[1], p.shape[1]
    taught = g_cross_row.numel() > 0
    config = distill_config(config_for(x if x.element_size() >= p.element_size() else p))
    unit = gradient_unit(g_row, g_col, g_pos, g_cross_row, g_cross_col)
    shift, flag = static_shift(x, y, scale)
    factor, gradient, lse, trusted = _factors(g_row, g_col, row_lse, col_lse, shift, unit)
    raised = (flag != 0) | trusted.logical_not()
    teacher = (factor, gradient, lse)
    if taught:
        teacher_shift, teacher_flag = static_shift(p, q, teacher_scale)
        *teacher_parts, trusted = _factors(
            g_cross_row, g_cross_col, teacher_row, teacher_col, teacher_shift, unit
        )
        teacher = (teacher_parts[0], teacher_parts[1], teacher_parts[2])
        raised = raised | (teacher_flag != 0) | trusted.logical_not()
    raised = raised.to(torch.int32)
    g_pos = g_pos / unit
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
    *student, tma = operands(x, y, config)
    *others, teacher_tma = operands(p, q, config)
    for start in range(0, m, step):
        stop = min(start + step, m)
        grid = (tiles_n, triton.cdiv(stop - start, config.block_m))
        similarity_distill_bwd_kernel_stripe[grid](
            *student, *others, scale, teacher_scale, raised, factor, gradient, lse, *teacher, g_pos,
            stripe_buffer, dscale, first_tile, start, stop, diagonal, m, n, d, e,
            TMA=tma, TEACHER_TMA=teacher_tma, COLUMNS=g_col.numel() > 0, POSITIVES=g_pos.numel() > 0, TEACHER=taught,
            TEACHER_COLUMNS=g_cross_col.numel() > 0, SCALE=need_scale, PRECISION=precision(x),
            TEACHER_PRECISION=precision(p), BLOCK_M=config.block_m, BLOCK_N=config.block_n,
            BLOCK_K=config.block_k, num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
        dy = add_stripe_gradients(stripe_buffer[: stop - start], start, x, y, dx, dy)
        first_tile += grid[0] * grid[1]
    return dx.mul_(scale * unit), dy.mul_(scale * unit), dscale.sum() * unit
