"""Triton kernels of `similarity_rank`, and the function that launches them.

The S = x yᵀ tile is made once. Differences from the thresholds of its rows and of its columns are counted where they
exceed the tile's proven rounding error; pairs within it go to a list, and a second kernel decides those in fp64. Each
program owns a block of tiles, its own row of the slabs of counts and its own part of the list; counts are integers,
so the result is the same every run. A program whose list overflows (features that hardly differ) is counted whole by
the second kernel instead. The host never waits.

Memory: slabs of at most 64·(M+N) pairs of counts, and a list of 128 MiB or so.
"""

# mypy: disable-error-code="no-untyped-def"
# (Triton reads the annotations of its kernels as types of its own)

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_launch import on_its_device
from ..triton_tiles import Config, config_for, operands, precision, product_tile
from .chunked import norms, quick_error, quick_thresholds, rounding

# programs along one side, at most; more tiles than that are looped over
_SIDE = 64
# pairs between two uses of the list, and the share of them it holds: 2^25 entries of 4 bytes
_STRIPE_PAIRS = 1 << 30
_LIST_SHARE = 32
# pairs decided at a time by one program, and programs that share a list
_PAIRS = 16
_SPLIT = 8


def rank_config(shared: Config) -> Config:
    """Returns the tile for counting: fewer pairs a thread than `shared`, since their masks need registers."""
    if shared.num_warps == 4:
        return dataclasses.replace(shared, num_warps=8)
    return dataclasses.replace(shared, block_m=max(16, shared.block_m // 2))


@triton.jit
def compare(acc, score, error, outer, inner):
    """Which products lie above the threshold for sure, at it for sure, and which are left open.

    Where `error` is NaN a product is none of these.
    """
    difference = acc - score
    # an infinity less an infinity, of sums that overflowed: their error is infinite too
    difference = tl.where(difference == difference, difference, 0.0)
    size = tl.abs(difference)
    return difference > error + outer, size < inner - error, (size <= error + outer) & (size >= inner - error)


@triton.jit
def leave(list_ptr, found_ptr, pair, left, kind, CAPACITY: tl.constexpr):
    """Puts open pairs on the program's list, in any order: what is decided later adds up to the same."""
    place = tl.atomic_add(found_ptr + tl.zeros_like(pair), 1, mask=left, sem="relaxed")
    tl.store(list_ptr + place, pair * 4 + kind, mask=left & (place < CAPACITY))


@triton.jit(do_not_specialize=["M", "group_m", "group_n", "tolerance"])
def similarity_rank_kernel_count(
    x_ptr,  # (M, D), or its descriptor
    y_ptr,  # (N, D), or its descriptor
    row_score_ptr,  # (M,) f32
    row_slack_ptr,  # (M,) f32
    x_error_ptr,  # (M,) f32, NaN for rows with NaN
    col_score_ptr,  # (N,) f32
    col_slack_ptr,  # (N,) f32
    y_error_ptr,  # (N,) f32
    row_slab_ptr,  # (2, programs along n, M) i32: above, tied
    col_slab_ptr,  # (2, programs along m, N) i32, zeros
    list_ptr,  # (programs, CAPACITY) i32: a pair of the program·4, + 1 if open for its row, + 2 for its column
    found_ptr,  # (programs,) i32, zeros: pairs left open, those beyond CAPACITY too
    tolerance,
    M,
    N,
    D,
    group_m,
    group_n,
    TMA: tl.constexpr,
    COLUMNS: tl.constexpr,
    CAPACITY: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    i_n = tl.program_id(0).to(tl.int64)
    i_m = tl.program_id(1).to(tl.int64)
    row_tied_ptr = row_slab_ptr + tl.num_programs(0).to(tl.int64) * M
    col_tied_ptr = col_slab_ptr + tl.num_programs(1).to(tl.int64) * N
    program = i_m * tl.num_programs(0) + i_n
    own_list = list_ptr + program * CAPACITY
    own_found = found_ptr + program
    # columns of this program; its pairs are numbered row by row
    width = tl.minimum(group_n * BLOCK_N, (N - i_n * group_n * BLOCK_N).to(tl.int32))
    for t_m in range(0, group_m):
        start_m = (i_m * group_m + t_m) * BLOCK_M
        offs_m = start_m + tl.arange(0, BLOCK_M)
        in_m = offs_m < M
        row_score = tl.load(row_score_ptr + offs_m, mask=in_m, other=0.0)
        row_slack = tl.load(row_slack_ptr + offs_m, mask=in_m, other=0.0)
        # a score with NaN is neither above nor tied, and nothing is left open
        x_error = tl.load(x_error_ptr + offs_m, mask=in_m, other=float("nan"))
        row_above = tl.zeros((BLOCK_M,), dtype=tl.int32)
        row_tied = tl.zeros((BLOCK_M,), dtype=tl.int32)
        for t_n in range(0, group_n):
            start_n = (i_n * group_n + t_n) * BLOCK_N
            offs_n = start_n + tl.arange(0, BLOCK_N)
            in_n = offs_n < N
            y_error = tl.load(y_error_ptr + offs_n, mask=in_n, other=float("nan"))
            acc = product_tile(
                x_ptr, y_ptr, start_m, start_n, M, N, D, TMA, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K
            )
            error = x_error[:, None] * y_error[None, :]
            above, tied, left = compare(
                acc,
                row_score[:, None],
                error,
                (row_slack + tolerance)[:, None],
                (tolerance - row_slack)[:, None],
            )
            row_above += tl.sum(above.to(tl.int32), axis=1)
            row_tied += tl.sum(tied.to(tl.int32), axis=1)
            pair = (t_m * BLOCK_M + tl.arange(0, BLOCK_M))[:, None] * width
            pair += (t_n * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
            leave(own_list, own_found, pair, left, 1, CAPACITY)
            if COLUMNS:
                col_score = tl.load(col_score_ptr + offs_n, mask=in_n, other=0.0)
                col_slack = tl.load(col_slack_ptr + offs_n, mask=in_n, other=0.0)
                above, tied, left = compare(
                    acc,
                    col_score[None, :],
                    error,
                    (col_slack + tolerance)[None, :],
                    (tolerance - col_slack)[None, :],
                )
                leave(own_list, own_found, pair, left, 2, CAPACITY)
                p_above = col_slab_ptr + i_m * N + offs_n
                p_tied = col_tied_ptr + i_m * N + offs_n
                total = tl.load(p_above, mask=in_n, other=0) + tl.sum(above.to(tl.int32), axis=0)
                tl.store(p_above, total, mask=in_n)
                total = tl.load(p_tied, mask=in_n, other=0) + tl.sum(tied.to(tl.int32), axis=0)
                tl.store(p_tied, total, mask=in_n)
                # the next tile row of this program reads what was just written
                tl.debug_barrier()
        tl.store(row_slab_ptr + i_n * M + offs_m, row_above, mask=in_m)
        tl.store(row_tied_ptr + i_n * M + offs_m, row_tied, mask=in_m)


@triton.jit(do_not_specialize=["M", "programs_n", "group_rows", "group_cols"])
def similarity_rank_kernel_decide(
    x_ptr,  # (M, D)
    y_ptr,  # (N, D)
    row_best_ptr,  # (M,) f64
    col_best_ptr,  # (N,) f64
    x_norm_ptr,  # (M,) f64
    y_norm_ptr,  # (N,) f64
    limits_ptr,  # (2,) f64: tolerance, and the rounding of a product in fp64 for norms of 1
    list_ptr,  # (programs, CAPACITY) i32
    found_ptr,  # (programs,) i32
    row_ptr,  # (2, M) i32, zeros: above, tied
    col_ptr,  # (2, N) i32, zeros
    M,
    N,
    D,
    programs_n,
    group_rows,
    group_cols,
    COLUMNS: tl.constexpr,
    CAPACITY: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    program = tl.program_id(1).to(tl.int64)
    found = tl.load(found_ptr + program).to(tl.int64)
    listed = found <= CAPACITY
    first_row = program // programs_n * group_rows
    first_col = program % programs_n * group_cols
    rows = tl.maximum(tl.minimum(group_rows, M - first_row), 0)
    cols = tl.maximum(tl.minimum(group_cols, N - first_col), 1)
    total = tl.where(listed, found, rows * cols)
    entries = tl.where(listed, found, 0)
    tolerance = tl.load(limits_ptr)
    unit = tl.load(limits_ptr + 1)
    start = tl.program_id(0).to(tl.int64) * BLOCK_P
    for p in range(start, total, tl.num_programs(0) * BLOCK_P):
        offs_p = p + tl.arange(0, BLOCK_P).to(tl.int64)
        in_p = offs_p < total
        entry = tl.load(list_ptr + program * CAPACITY + offs_p, mask=offs_p < entries, other=0)
        pair = tl.where(listed, (entry // 4).to(tl.int64), offs_p)
        kind = tl.where(listed, entry % 4, 3)
        # past the end: the first pair, counted by nobody
        i = first_row + tl.where(in_p, pair // cols, 0)
        j = first_col + tl.where(in_p, pair % cols, 0)
        score = tl.zeros((BLOCK_P,), dtype=tl.float64)
        for k in range(0, D, BLOCK_K):
            depth = k + tl.arange(0, BLOCK_K)
            in_k = depth[None, :] < D
            a = tl.load(x_ptr + i[:, None] * D + depth[None, :], mask=in_k, other=0.0).to(tl.float64)
            b = tl.load(y_ptr + j[:, None] * D + depth[None, :], mask=in_k, other=0.0).to(tl.float64)
            score += tl.sum(a * b, axis=1)
        size = unit * tl.load(x_norm_ptr + i) * tl.load(y_norm_ptr + j)
        margin = tolerance + tl.where(size - size == 0.0, size, 0.0)
        best = tl.load(row_best_ptr + i)
        over = score > best + margin
        same = (over == 0) & (score >= best - margin)
        of_row = in_p & ((kind & 1) != 0)
        one = tl.full((BLOCK_P,), 1, dtype=tl.int32)
        tl.atomic_add(row_ptr + i, one, mask=of_row & over, sem="relaxed")
        tl.atomic_add(row_ptr + M + i, one, mask=of_row & same, sem="relaxed")
        if COLUMNS:
            best = tl.load(col_best_ptr + j)
            over = score > best + margin
            same = (over == 0) & (score >= best - margin)
            of_col = in_p & ((kind & 2) != 0)
            tl.atomic_add(col_ptr + j, one, mask=of_col & over, sem="relaxed")
            tl.atomic_add(col_ptr + N + j, one, mask=of_col & same, sem="relaxed")


@on_its_device
def count(
    x: Tensor, y: Tensor, row_best: Tensor, col_best: Tensor, tolerance: float
) -> tuple[Tensor, Tensor]:
    """Returns (2, M) and (2, N) or (2, 0) int64; arguments as in `chunked.count`."""
    columns = col_best.numel() > 0
    x_norm, y_norm = norms(x), norms(y)
    x_error, y_error = quick_error(x, x_norm, y_norm)
    x_error = torch.where(x_norm.isnan(), torch.full_like(x_error, torch.nan), x_error)
    row_score, row_slack = quick_thresholds(row_best, tolerance, torch.float32)
    col_score, col_slack = quick_thresholds(col_best, tolerance, torch.float32)
    limits = torch.stack([x_norm.new_full((), tolerance), x_norm.new_full((), rounding(x.shape[1]))])
    row_parts: list[Tensor] = []
    cols = torch.zeros(2, y.shape[0] if columns else 0, dtype=torch.int64, device=x.device)
    block_m = rank_config(config_for(x)).block_m
    step = max(1, _STRIPE_PAIRS // (y.shape[0] * block_m)) * block_m
    for start in range(0, x.shape[0], step):
        part = slice(start, start + step)
        of_rows, of_cols = _count_stripe(
            x[part], y, (row_score[part], row_slack[part], x_error[part]), (col_score, col_slack, y_error),
            (row_best[part], x_norm[part]), (col_best, y_norm), limits, tolerance,
        )  # fmt: skip
        row_parts.append(of_rows)
        if columns:
            cols += of_cols
    return torch.cat(row_parts, dim=1), cols


def _count_stripe(
    x: Tensor,
    y: Tensor,
    row_quick: tuple[Tensor, Tensor, Tensor],
    col_quick: tuple[Tensor, Tensor, Tensor],
    row_exact: tuple[Tensor, Tensor],
    col_exact: tuple[Tensor, Tensor],
    limits: Tensor,
    tolerance: float,
) -> tuple[Tensor, Tensor]:
    m, n, d = x.shape[0], y.shape[0], x.shape[1]
    columns = col_exact[0].numel() > 0
    config = rank_config(config_for(x))
    group_m = triton.cdiv(triton.cdiv(m, config.block_m), _SIDE)
    group_n = triton.cdiv(triton.cdiv(n, config.block_n), _SIDE)
    rows_each, cols_each = group_m * config.block_m, group_n * config.block_n
    grid = (triton.cdiv(n, cols_each), triton.cdiv(m, rows_each))
    # a power of two, so that few sizes are compiled
    capacity = triton.next_power_of_2(max(256, rows_each * cols_each // _LIST_SHARE))
    row_slab = torch.empty(2, grid[0], m, dtype=torch.int32, device=x.device)
    col_slab = torch.zeros(2, grid[1], n if columns else 0, dtype=torch.int32, device=x.device)
    pairs = torch.empty(grid[0] * grid[1], capacity, dtype=torch.int32, device=x.device)
    found = torch.zeros(grid[1], grid[0], dtype=torch.int32, device=x.device)
    *tiles, tma = operands(x, y, config)
    similarity_rank_kernel_count[grid](
        *tiles, *row_quick, *col_quick, row_slab, col_slab, pairs, found, tolerance, m, n, d, group_m, group_n,
        TMA=tma, COLUMNS=columns, CAPACITY=capacity, PRECISION=precision(x),
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    rows = torch.zeros(2, m, dtype=torch.int32, device=x.device)
    cols = torch.zeros(2, n if columns else 0, dtype=torch.int32, device=x.device)
    similarity_rank_kernel_decide[(_SPLIT, grid[0] * grid[1])](
        x, y, row_exact[0], col_exact[0], row_exact[1], col_exact[1], limits, pairs, found, rows, cols,
        m, n, d, grid[0], rows_each, cols_each,
        COLUMNS=columns, CAPACITY=capacity, BLOCK_P=_PAIRS, BLOCK_K=64, num_warps=4,
    )  # fmt: skip
    # what a program counted whose list overflowed is counted again
    kept = found <= capacity
    of_rows = torch.arange(m, device=x.device) // rows_each
    rows = rows.long() + (row_slab * kept.T[:, of_rows]).sum(1)
    if columns:
        of_cols = torch.arange(n, device=x.device) // cols_each
        cols = cols.long() + (col_slab * kept[:, of_cols]).sum(1)
    return rows, cols
