"""Triton kernels of `similarity_lse`; `launch.py` launches them.

The S = scale · x yᵀ tile is made twice: once for row and column sums of exp(S - c), once for a stripe of
G = dL/dS in the inputs' dtype, which the library GEMM then multiplies with y and x. One constant shift
c = max(0, |scale|·max‖x‖·max‖y‖ - 70) serves every row and column, so there is one exp per pair and partial
sums add up. Each program owns a block of tiles and its own row of the slabs of partial sums, added afterwards
in a fixed order: no atomics, bitwise the same every run. Sums too small to trust raise a flag on the device,
and only then does the kernel with running maxima do anything; the host never waits.

With a cache, the sums' kernel also stores exp(S - c) in bf16, whose exponents reach as far as fp32's; the
backward then reads it instead of making S again.
"""

# mypy: disable-error-code="no-untyped-def"
# (Triton reads the annotations of its kernels as types of its own)

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_tiles import counted, finite, product_tile


@triton.jit(do_not_specialize=["M", "group_m", "group_n", "diagonal"])
def similarity_lse_fwd_kernel_sums(
    x_ptr,  # (M, D)
    y_ptr,  # (N, D)
    scale_ptr,  # () f32
    shift_ptr,  # () f32
    row_slab_ptr,  # (programs along n, M) f32, zeros
    col_slab_ptr,  # (programs along m, N) f32, zeros
    cache_ptr,  # (M, N) bf16, receives exp(S - shift)
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
    CACHE: tl.constexpr,
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
                inside &= counted(x_code_ptr, y_code_ptr, start_m, start_n, diagonal, M, N, BLOCK_M, BLOCK_N)
            e = tl.where(inside, e, 0.0)
            if CACHE:
                p_cache = cache_ptr + offs_m[:, None] * N + offs_n[None, :]
                tl.store(p_cache, e.to(tl.bfloat16), mask=(offs_m[:, None] < M) & (offs_n[None, :] < N))
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
                    inside &= counted(
                        x_code_ptr, y_code_ptr, start_m, start_n, diagonal, M, N, BLOCK_M, BLOCK_N
                    )
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


@triton.jit(do_not_specialize=["M", "start", "stop", "diagonal"])
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
    dscale_ptr,  # (tiles of the stripe,) f32: partial sums of G·dot
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
    CACHE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    if CACHE:
        # a cache that can be trusted serves instead: the other kernel writes this stripe
        if tl.load(flag_ptr) == 0:
            return
    i_n = tl.program_id(0).to(tl.int64)
    i_m = tl.program_id(1).to(tl.int64)
    # 64 bits only for where the tile begins: 64-bit numbers for each of its elements would fill the registers
    start_m, start_n = start + i_m * BLOCK_M, i_n * BLOCK_N
    rows, cols = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    in_m = rows < (stop - start_m).to(tl.int32)
    in_n = cols < (N - start_n).to(tl.int32)
    scale = tl.load(scale_ptr)
    dots = product_tile(x_ptr, y_ptr, start_m, start_n, M, N, D, TMA, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
    logits = dots * scale
    if tl.load(flag_ptr) == 0:
        factor = tl.load(row_factor_ptr + start_m + rows, mask=in_m, other=0.0)[:, None]
        if COLUMNS:
            factor = factor + tl.load(col_factor_ptr + start_n + cols, mask=in_n, other=0.0)[None, :]
        g = tl.exp(logits - tl.load(shift_ptr)) * factor
    else:
        row_lse = tl.load(row_lse_ptr + start_m + rows, mask=in_m, other=0.0)
        g_row = tl.load(g_row_ptr + start_m + rows, mask=in_m, other=0.0)
        g = tl.exp(logits - row_lse[:, None]) * g_row[:, None]
        if COLUMNS:
            col_lse = tl.load(col_lse_ptr + start_n + cols, mask=in_n, other=0.0)
            g_col = tl.load(g_col_ptr + start_n + cols, mask=in_n, other=0.0)
            g += tl.exp(logits - col_lse[None, :]) * g_col[None, :]
    if GROUPS:
        g = tl.where(
            counted(x_code_ptr, y_code_ptr, start_m, start_n, diagonal, M, N, BLOCK_M, BLOCK_N), g, 0.0
        )
    if POSITIVES:
        # before rounding: near convergence p - 1 cancels
        g_pos = tl.load(g_pos_ptr + start_m + rows, mask=in_m, other=0.0)
        own = rows[:, None] + (start_m + diagonal - start_n).to(tl.int32) == cols[None, :]
        g += tl.where(own, g_pos[:, None], 0.0)
    inside = in_m[:, None] & in_n[None, :]
    if SCALE:
        total = tl.sum(tl.sum(tl.where(inside, g * dots, 0.0), axis=1), axis=0)
        tl.store(dscale_ptr + i_m * tl.num_programs(0) + i_n, total)
    p_stripe = stripe_ptr + i_m * BLOCK_M * N + start_n + (rows[:, None] * N + cols[None, :])
    tl.store(p_stripe, g.to(stripe_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["start", "stop", "diagonal"])
def similarity_lse_bwd_kernel_cached(
    cache_ptr,  # (M, N) bf16: exp(S - shift), zero where left out
    scale_ptr,  # () f32
    shift_ptr,  # () f32
    flag_ptr,  # () i32, nothing happens unless it is 0
    row_factor_ptr,  # (M,) f32: g_row·exp(shift - row_lse)
    col_factor_ptr,  # (N,) f32: g_col·exp(shift - col_lse)
    g_pos_ptr,  # (M,) f32
    pos_ptr,  # (M,) f32: the positives' logits, which bf16 would round
    stripe_ptr,  # (stop - start, N): G
    dscale_ptr,  # (tiles of the stripe,) f32: partial sums of G·dot
    start,
    stop,
    diagonal,
    N,
    COLUMNS: tl.constexpr,
    POSITIVES: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
):
    if tl.load(flag_ptr) != 0:
        return
    i_n = tl.program_id(0).to(tl.int64)
    i_m = tl.program_id(1).to(tl.int64)
    offs_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = offs_n < N
    scale = tl.load(scale_ptr)
    shift = tl.load(shift_ptr)
    if COLUMNS:
        col_factor = tl.load(col_factor_ptr + offs_n, mask=in_n, other=0.0)
    total = 0.0
    # a few rows at a time: the addresses of a whole tile would not fit the registers
    for first in range(0, BLOCK_M, ROWS):
        local_m = i_m * BLOCK_M + first + tl.arange(0, ROWS)
        offs_m = start + local_m
        in_m = offs_m < stop
        inside = in_m[:, None] & in_n[None, :]
        p_cache = cache_ptr + offs_m[:, None] * N + offs_n[None, :]
        e = tl.load(p_cache, mask=inside, other=0.0).to(tl.float32)
        factor = tl.load(row_factor_ptr + offs_m, mask=in_m, other=0.0)[:, None]
        if COLUMNS:
            factor = factor + col_factor[None, :]
        if POSITIVES:
            own = (offs_m + diagonal).to(tl.int32)[:, None] == offs_n.to(tl.int32)[None, :]
            pos = tl.load(pos_ptr + offs_m, mask=in_m, other=0.0)
            g_pos = tl.load(g_pos_ptr + offs_m, mask=in_m, other=0.0)
            e = tl.where(own, tl.exp(pos - shift)[:, None], e)
            g = e * factor + tl.where(own, g_pos[:, None], 0.0)
        else:
            g = e * factor
        if SCALE:
            # log takes the logit back to within 2^-8; at scale 0 the launcher has another way
            logits = tl.log(e) + shift
            total += tl.sum(tl.sum(tl.where(inside & (e > 0.0), g * logits, 0.0), axis=1), axis=0)
        p_stripe = stripe_ptr + local_m[:, None] * N + offs_n[None, :]
        tl.store(p_stripe, g.to(stripe_ptr.dtype.element_ty), mask=inside)
    if SCALE:
        tl.store(dscale_ptr + i_m * tl.num_programs(0) + i_n, total / scale)
