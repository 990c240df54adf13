"""Triton kernels of `similarity_distill`, and the functions that launch them.

A program makes a tile of S = scale · x yᵀ and the same tile of T = teacher_scale · p qᵀ one after the other. Once for
the sums of exp(S), exp(T) and exp(T)·S along rows and columns, each relative to one constant shift (see
`similarity_lse.kernel`); once for a stripe of G = dL/dS in the student's dtype, which the library GEMM then
multiplies with y and x. Programs own their row of the slabs of partial sums, which are added in a fixed order: no
atomics, bitwise the same every run. Sums that cannot be trusted raise a flag on the device, and only then does the
kernel with running maxima do anything; the host never waits.

Memory: five slabs of at most 32·(M+N) floats, and a stripe of G of `_STRIPE_BYTES`.
"""

# mypy: disable-error-code="no-untyped-def"
# (Triton reads the annotations of its kernels as types of its own)

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..stripes import add_stripe_gradients, gradient_unit
from ..triton_launch import on_its_device
from ..triton_tiles import Config, config_for, finite, operands, precision, product_tile, static_shift

# log of the smallest sum, relative to the shift, whose flushed terms cannot matter: log 1e-26
_LOWEST_SUM = -59.8
# programs along one side, at most; more tiles than that are looped over
_SIDE = 32
_STRIPE_BYTES = 256 * 2**20


@triton.jit(do_not_specialize=["M", "group_m", "group_n"])
def similarity_distill_fwd_kernel_sums(
    x_ptr,  # (M, D), or its descriptor
    y_ptr,  # (N, D), or its descriptor
    p_ptr,  # (M, E), or its descriptor
    q_ptr,  # (N, E), or its descriptor
    scale_ptr,  # () f32
    teacher_scale_ptr,  # () f32
    shift_ptr,  # () f32
    teacher_shift_ptr,  # () f32
    row_origin_ptr,  # (M,) f32
    col_origin_ptr,  # (N,) f32
    row_slab_ptr,  # (5, programs along n, M) f32; the first three: sums of exp(S), exp(T), exp(T)·(S - origin)
    col_slab_ptr,  # (5, programs along m, N) f32
    M,
    N,
    D,
    E,
    group_m,
    group_n,
    TMA: tl.constexpr,
    TEACHER_TMA: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
    TEACHER_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    i_n = tl.program_id(0).to(tl.int64)
    i_m = tl.program_id(1).to(tl.int64)
    row_slab = tl.num_programs(0).to(tl.int64) * M
    col_slab = tl.num_programs(1).to(tl.int64) * N
    scale = tl.load(scale_ptr)
    teacher_scale = tl.load(teacher_scale_ptr)
    shift = tl.load(shift_ptr)
    teacher_shift = tl.load(teacher_shift_ptr)
    for t_m in range(0, group_m):
        start_m = (i_m * group_m + t_m) * BLOCK_M
        offs_m = start_m + tl.arange(0, BLOCK_M)
        in_m = offs_m < M
        row_origin = tl.load(row_origin_ptr + offs_m, mask=in_m, other=0.0)
        student_sum = tl.zeros((BLOCK_M,), dtype=tl.float32)
        teacher_sum = tl.zeros((BLOCK_M,), dtype=tl.float32)
        cross_sum = tl.zeros((BLOCK_M,), dtype=tl.float32)
        for t_n in range(0, group_n):
            start_n = (i_n * group_n + t_n) * BLOCK_N
            offs_n = start_n + tl.arange(0, BLOCK_N)
            in_n = offs_n < N
            inside = in_m[:, None] & in_n[None, :]
            logits = scale * product_tile(
                x_ptr, y_ptr, start_m, start_n, M, N, D, TMA, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K
            )
            e = tl.where(inside, tl.exp(logits - shift), 0.0)
            teacher = teacher_scale * product_tile(
                p_ptr,
                q_ptr,
                start_m,
                start_n,
                M,
                N,
                E,
                TEACHER_TMA,
                TEACHER_PRECISION,
                BLOCK_M,
                BLOCK_N,
                BLOCK_K,
            )
            w = tl.where(inside, tl.exp(teacher - teacher_shift), 0.0)
            student_sum += tl.sum(e, axis=1)
            teacher_sum += tl.sum(w, axis=1)
            # rows and columns past the end hold copies, whose logits may be anything: 0 · inf is not 0
            cross_sum += tl.sum(tl.where(inside, w * (logits - row_origin[:, None]), 0.0), axis=1)
            if COLUMNS:
                col_origin = tl.load(col_origin_ptr + offs_n, mask=in_n, other=0.0)
                cross = tl.where(inside, w * (logits - col_origin[None, :]), 0.0)
                p_col = col_slab_ptr + i_m * N + offs_n
                # the first tile row finds whatever was in memory
                seen = in_n & (t_m > 0)
                total = tl.load(p_col, mask=seen, other=0.0) + tl.sum(e, axis=0)
                tl.store(p_col, total, mask=in_n)
                total = tl.load(p_col + col_slab, mask=seen, other=0.0) + tl.sum(w, axis=0)
                tl.store(p_col + col_slab, total, mask=in_n)
                total = tl.load(p_col + 2 * col_slab, mask=seen, other=0.0) + tl.sum(cross, axis=0)
                tl.store(p_col + 2 * col_slab, total, mask=in_n)
                # the next tile row of this program reads what was just written
                tl.debug_barrier()
        p_row = row_slab_ptr + i_n * M + offs_m
        tl.store(p_row, student_sum, mask=in_m)
        tl.store(p_row + row_slab, teacher_sum, mask=in_m)
        tl.store(p_row + 2 * row_slab, cross_sum, mask=in_m)


@triton.jit
def kept(total, before, after):
    # an empty sum stays empty whatever its maximum was
    return tl.where(total == 0.0, 0.0, total * tl.exp(finite(before) - finite(after)))


@triton.jit(do_not_specialize=["M", "group_m", "group_n"])
def similarity_distill_fwd_kernel_online(
    x_ptr,  # (M, D), or its descriptor
    y_ptr,  # (N, D), or its descriptor
    p_ptr,  # (M, E), or its descriptor
    q_ptr,  # (N, E), or its descriptor
    scale_ptr,  # () f32
    teacher_scale_ptr,  # () f32
    flag_ptr,  # () i32, nothing happens where it is 0
    row_origin_ptr,  # (M,) f32
    col_origin_ptr,  # (N,) f32
    row_slab_ptr,  # (5, programs along n, M) f32: the sums relative to maxima, then the maxima of S and of T
    col_slab_ptr,  # (5, programs along m, N) f32
    M,
    N,
    D,
    E,
    group_m,
    group_n,
    TMA: tl.constexpr,
    TEACHER_TMA: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
    TEACHER_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    if tl.load(flag_ptr) != 0:
        i_n = tl.program_id(0).to(tl.int64)
        i_m = tl.program_id(1).to(tl.int64)
        row_slab = tl.num_programs(0).to(tl.int64) * M
        col_slab = tl.num_programs(1).to(tl.int64) * N
        scale = tl.load(scale_ptr)
        teacher_scale = tl.load(teacher_scale_ptr)
        for t_m in range(0, group_m):
            start_m = (i_m * group_m + t_m) * BLOCK_M
            offs_m = start_m + tl.arange(0, BLOCK_M)
            in_m = offs_m < M
            row_origin = tl.load(row_origin_ptr + offs_m, mask=in_m, other=0.0)
            student_max = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
            teacher_max = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
            student_sum = tl.zeros((BLOCK_M,), dtype=tl.float32)
            teacher_sum = tl.zeros((BLOCK_M,), dtype=tl.float32)
            cross_sum = tl.zeros((BLOCK_M,), dtype=tl.float32)
            for t_n in range(0, group_n):
                start_n = (i_n * group_n + t_n) * BLOCK_N
                offs_n = start_n + tl.arange(0, BLOCK_N)
                in_n = offs_n < N
                inside = in_m[:, None] & in_n[None, :]
                logits = scale * product_tile(
                    x_ptr, y_ptr, start_m, start_n, M, N, D, TMA, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K
                )
                teacher = teacher_scale * product_tile(
                    p_ptr,
                    q_ptr,
                    start_m,
                    start_n,
                    M,
                    N,
                    E,
                    TEACHER_TMA,
                    TEACHER_PRECISION,
                    BLOCK_M,
                    BLOCK_N,
                    BLOCK_K,
                )
                top = tl.maximum(student_max, tl.max(tl.where(inside, logits, float("-inf")), axis=1))
                e = tl.where(inside, tl.exp(logits - finite(top)[:, None]), 0.0)
                student_sum = kept(student_sum, student_max, top) + tl.sum(e, axis=1)
                student_max = top
                top = tl.maximum(teacher_max, tl.max(tl.where(inside, teacher, float("-inf")), axis=1))
                w = tl.where(inside, tl.exp(teacher - finite(top)[:, None]), 0.0)
                teacher_sum = kept(teacher_sum, teacher_max, top) + tl.sum(w, axis=1)
                cross = tl.where(inside, w * (logits - row_origin[:, None]), 0.0)
                cross_sum = kept(cross_sum, teacher_max, top) + tl.sum(cross, axis=1)
                teacher_max = top
                if COLUMNS:
                    seen = in_n & (t_m > 0)
                    p_col = col_slab_ptr + i_m * N + offs_n
                    before = tl.load(p_col + 3 * col_slab, mask=seen, other=float("-inf"))
                    top_n = tl.maximum(before, tl.max(tl.where(inside, logits, float("-inf")), axis=0))
                    e = tl.where(inside, tl.exp(logits - finite(top_n)[None, :]), 0.0)
                    total = kept(tl.load(p_col, mask=seen, other=0.0), before, top_n) + tl.sum(e, axis=0)
                    tl.store(p_col, total, mask=in_n)
                    tl.store(p_col + 3 * col_slab, top_n, mask=in_n)
                    before = tl.load(p_col + 4 * col_slab, mask=seen, other=float("-inf"))
                    top_n = tl.maximum(before, tl.max(tl.where(inside, teacher, float("-inf")), axis=0))
                    w = tl.where(inside, tl.exp(teacher - finite(top_n)[None, :]), 0.0)
                    total = tl.load(p_col + col_slab, mask=seen, other=0.0)
                    tl.store(p_col + col_slab, kept(total, before, top_n) + tl.sum(w, axis=0), mask=in_n)
                    col_origin = tl.load(col_origin_ptr + offs_n, mask=in_n, other=0.0)
                    cross = tl.where(inside, w * (logits - col_origin[None, :]), 0.0)
                    total = tl.load(p_col + 2 * col_slab, mask=seen, other=0.0)
                    tl.store(
                        p_col + 2 * col_slab, kept(total, before, top_n) + tl.sum(cross, axis=0), mask=in_n
                    )
                    tl.store(p_col + 4 * col_slab, top_n, mask=in_n)
                    tl.debug_barrier()
            p_row = row_slab_ptr + i_n * M + offs_m
            tl.store(p_row, student_sum, mask=in_m)
            tl.store(p_row + row_slab, teacher_sum, mask=in_m)
            tl.store(p_row + 2 * row_slab, cross_sum, mask=in_m)
            tl.store(p_row + 3 * row_slab, student_max, mask=in_m)
            tl.store(p_row + 4 * row_slab, teacher_max, mask=in_m)


@triton.jit
def weighted(
    logits,  # (BLOCK_M, BLOCK_N) f32
    factor_ptr,  # () f32 shift, then (M,) and (N,) f32: gradient·exp(shift - lse)
    gradient_ptr,  # (M,) and (N,) f32
    lse_ptr,  # (M,) and (N,) f32
    offs_m,
    offs_n,
    in_m,
    in_n,
    M,
    online,
    COLUMNS: tl.constexpr,
):
    # columns follow the M rows
    if online:
        lse = tl.load(lse_ptr + offs_m, mask=in_m, other=0.0)
        g = tl.exp(logits - lse[:, None]) * tl.load(gradient_ptr + offs_m, mask=in_m, other=0.0)[:, None]
        if COLUMNS:
            lse = tl.load(lse_ptr + M + offs_n, mask=in_n, other=0.0)
            g_col = tl.load(gradient_ptr + M + offs_n, mask=in_n, other=0.0)
            g += tl.exp(logits - lse[None, :]) * g_col[None, :]
    else:
        factor = tl.load(factor_ptr + 1 + offs_m, mask=in_m, other=0.0)[:, None]
        if COLUMNS:
            factor = factor + tl.load(factor_ptr + 1 + M + offs_n, mask=in_n, other=0.0)[None, :]
        g = tl.exp(logits - tl.load(factor_ptr)) * factor
    return g


@triton.jit(do_not_specialize=["M", "first_tile", "start", "stop", "diagonal"])
def similarity_distill_bwd_kernel_stripe(
    x_ptr,  # (M, D), or its descriptor
    y_ptr,  # (N, D), or its descriptor
    p_ptr,  # (M, E), or its descriptor
    q_ptr,  # (N, E), or its descriptor
    scale_ptr,  # () f32
    teacher_scale_ptr,  # () f32
    flag_ptr,  # () i32
    factor_ptr,  # (1 + M + N,) f32, see `weighted`
    gradient_ptr,  # (M + N,) f32
    lse_ptr,  # (M + N,) f32
    teacher_factor_ptr,  # (1 + M + N,) f32
    teacher_gradient_ptr,  # (M + N,) f32
    teacher_lse_ptr,  # (M + N,) f32
    g_pos_ptr,  # (M,) f32
    stripe_ptr,  # (stop - start, N), dtype of x: G
    dscale_ptr,  # (all tiles of all stripes,) f32: partial sums of G·dot
    first_tile,
    start,
    stop,
    diagonal,
    M,
    N,
    D,
    E,
    TMA: tl.constexpr,
    TEACHER_TMA: tl.constexpr,
    COLUMNS: tl.constexpr,
    POSITIVES: tl.constexpr,
    TEACHER: tl.constexpr,
    TEACHER_COLUMNS: tl.constexpr,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    TEACHER_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    i_n = tl.program_id(0).to(tl.int64)
    i_m = tl.program_id(1).to(tl.int64)
    local_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_m = start + local_m
    offs_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    start_m, start_n = start + i_m * BLOCK_M, i_n * BLOCK_N
    in_m = offs_m < stop
    in_n = offs_n < N
    online = tl.load(flag_ptr) != 0
    dots = product_tile(x_ptr, y_ptr, start_m, start_n, M, N, D, TMA, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
    g = weighted(
        dots * tl.load(scale_ptr),
        factor_ptr,
        gradient_ptr,
        lse_ptr,
        offs_m,
        offs_n,
        in_m,
        in_n,
        M,
        online,
        COLUMNS,
    )
    # all of G before it is rounded: near convergence p - 1 and p - p_teacher cancel
    if TEACHER:
        teacher = tl.load(teacher_scale_ptr) * product_tile(
            p_ptr, q_ptr, start_m, start_n, M, N, E, TEACHER_TMA, TEACHER_PRECISION, BLOCK_M, BLOCK_N, BLOCK_K
        )
        g += weighted(
            teacher, teacher_factor_ptr, teacher_gradient_ptr, teacher_lse_ptr, offs_m, offs_n, in_m, in_n, M, online,
            TEACHER_COLUMNS,
        )  # fmt: skip
    if POSITIVES:
        g_pos = tl.load(g_pos_ptr + offs_m, mask=in_m, other=0.0)
        # columns fit 32 bits
        own = (offs_m + diagonal).to(tl.int32)
        g += tl.where(offs_n.to(tl.int32)[None, :] == own[:, None], g_pos[:, None], 0.0)
    inside = in_m[:, None] & in_n[None, :]
    if SCALE:
        total = tl.sum(tl.sum(tl.where(inside, g * dots, 0.0), axis=1), axis=0)
        tl.store(dscale_ptr + first_tile + i_m * tl.num_programs(0) + i_n, total)
    p_stripe = stripe_ptr + local_m[:, None] * N + offs_n[None, :]
    tl.store(p_stripe, g.to(stripe_ptr.dtype.element_ty), mask=inside)


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
