"""Triton kernels of `similarity_distill` (launched by `launch.py`).

A program makes a tile of S = scale · x yᵀ and the same tile of T = teacher_scale · p qᵀ one after the other. Once for
the sums of exp(S), exp(T) and exp(T)·S along rows and columns, each relative to one constant shift (see
`similarity_lse.kernel`); once for a stripe of G = dL/dS in the student's dtype, which the library GEMM then
multiplies with y and x. Programs own their row of the slabs of partial sums, which are added in a fixed order: no
atomics, bitwise the same every run. Sums that cannot be trusted raise a flag on the device, and only then does the
kernel with running maxima do anything; the host never waits.
"""

# mypy: disable-error-code="no-untyped-def"
# (Triton reads the annotations of its kernels as types of its own)

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_tiles import finite, product_tile


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
