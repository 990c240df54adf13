"""Triton kernels of `lora_linear`, and the functions that launch them.

Forward: one tile of y is accumulated along K from x and W, then along R from u = xAᵀ and s·Bᵀ in the same
registers, gets its bias and is stored once. The low-rank product therefore costs R more columns of depth and
no second read and write of y. Backward: library GEMMs, see `products`. Dropout zeroes rows in place from the
mask of triton_dropout.py.
"""

# mypy: disable-error-code="no-untyped-def"
# (Triton reads the annotations of its kernels as types of its own)

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .. import _env
from ..triton_dropout import keeps
from ..triton_launch import on_its_device
from ..triton_tiles import Config, config_for, precision

# rows of tiles that share their columns of W in the L2 cache
_GROUP = 8
_DROP_BLOCK = 1024


@triton.jit(do_not_specialize=["M"])
def lora_linear_fwd_kernel(
    x_ptr,  # (M, K)
    w_ptr,  # (N, K)
    bias_ptr,  # (N,)
    u_ptr,  # (M, R): x Aᵀ
    b_ptr,  # (R, N): s·Bᵀ
    y_ptr,  # (M, N)
    M,
    N,
    K,
    R,
    stride_w,  # of a row of W
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    # programs that run together take GROUP rows of tiles down a column, so that both operands are reused
    program = tl.program_id(0)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    first_m = program // (GROUP * tiles_n) * GROUP
    height = tl.minimum(tiles_m - first_m, GROUP)
    within = program % (GROUP * tiles_n)
    i_m = (first_m + within % height).to(tl.int64)
    i_n = (within // height).to(tl.int64)
    offs_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # rows past the end repeat the last one: a load in bounds needs no mask, and the store is masked
    row_m = tl.minimum(offs_m, M - 1)
    row_n = tl.minimum(offs_n, N - 1)
    offs_k = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    p_x = x_ptr + row_m[:, None] * K
    p_w = w_ptr + row_n[None, :] * stride_w
    for k in range(0, K, BLOCK_K):
        depth = k + offs_k
        x = tl.load(p_x + depth[None, :], mask=depth[None, :] < K, other=0.0)
        w = tl.load(p_w + depth[:, None], mask=depth[:, None] < K, other=0.0)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
    offs_r = tl.arange(0, BLOCK_R).to(tl.int64)
    for r in range(0, R, BLOCK_R):
        rank = r + offs_r
        u = tl.load(u_ptr + row_m[:, None] * R + rank[None, :], mask=rank[None, :] < R, other=0.0)
        b = tl.load(b_ptr + rank[:, None] * N + row_n[None, :], mask=rank[:, None] < R, other=0.0)
        acc = tl.dot(u, b, acc, input_precision=PRECISION)
    if BIAS:
        acc += tl.load(bias_ptr + row_n)[None, :].to(tl.float32)
    p_y = y_ptr + offs_m[:, None] * N + offs_n[None, :]
    tl.store(p_y, acc.to(y_ptr.dtype.element_ty), mask=(offs_m[:, None] < M) & (offs_n[None, :] < N))


@triton.jit(do_not_specialize=["first_row", "threshold"])
def dropout_rows_kernel(
    t_ptr,  # (rows, cols), in place
    seed_ptr,  # one i64
    first_row,  # number of the first row in the whole matrix
    threshold,  # dropout.threshold(p)
    cols,
    BLOCK: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    keep = keeps(seed_ptr, first_row + i_row, column, threshold)
    # only zeros are written
    p_t = t_ptr + i_row * cols + column
    tl.store(p_t, tl.zeros((BLOCK,), dtype=t_ptr.dtype.element_ty), mask=(column < cols) & (keep == 0))


def _depth(config: Config, rank: int) -> int:
    """Depth of a step along R: no deeper than R asks for, no shallower than a dot product allows."""
    return max(16, min(config.block_k, triton.next_power_of_2(rank)))


@on_its_device
def forward(x: Tensor, weight: Tensor, bias: Tensor | None, u: Tensor, bt: Tensor) -> Tensor:
    """Returns x Wᵀ + bias + u bt, (T, N) in x's dtype, rounded once.

    x (T, K), weight (N, K), bias (N,) or None, u (T, R), bt (R, N), one dtype of fp32, bf16, fp16.
    """
    x, u, bt = x.contiguous(), u.contiguous(), bt.contiguous()
    if weight.stride(1) != 1:
        weight = weight.contiguous()
    m, n, k, r = x.shape[0], weight.shape[0], x.shape[1], bt.shape[0]
    y = x.new_empty(m, n)
    if y.numel() == 0:
        return y
    config = config_for(x)
    grid = (triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n),)
    lora_linear_fwd_kernel[grid](
        x, weight, y if bias is None else bias, u, bt, y, m, n, k, r, weight.stride(0),
        BIAS=bias is not None, PRECISION=precision(x), GROUP=_GROUP, BLOCK_M=config.block_m,
        BLOCK_N=config.block_n, BLOCK_K=config.block_k, BLOCK_R=_depth(config, r),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return y


@on_its_device
def dropout_rows_(t: Tensor, seed: Tensor, first_row: int, threshold: int) -> None:
    """Zeroes entries of a contiguous (rows, cols) matrix in place; threshold as `dropout.threshold`."""
    rows, cols = t.shape
    if t.numel() == 0:
        return
    block = 16 if _env.triton_interpreted() else _DROP_BLOCK
    dropout_rows_kernel[(rows, triton.cdiv(cols, block))](t, seed, first_row, threshold, cols, BLOCK=block)
