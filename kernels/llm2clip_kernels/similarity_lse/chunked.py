"""`similarity_lse` by row stripes and torch's own GEMM: every device, every dtype, fp64 included.

Always available, and the honest baseline of the fused kernels: 4 passes, but several sweeps over each stripe.
It keeps true maxima, so no input needs another path, and never asks the device for a value.
"""

from __future__ import annotations

import torch
from torch import Tensor

# of one stripe of logits; two or three of that size live at a time
_STRIPE_BYTES = 16 * 2**20


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _stripe_rows(columns: int, rows: int) -> int:
    # a GEMM of fewer than 128 rows wastes more than the workspace saves
    return max(1, min(rows, max(128, _STRIPE_BYTES // (4 * max(columns, 1)))))


def widen(t: Tensor) -> Tensor:
    """Half precision to fp32 where the device's GEMM cannot accumulate and return fp32 itself."""
    return t if t.is_cuda else t.to(_accumulator(t.dtype))


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, (M, K) by (K, N), accumulated and returned in fp32 (fp64 for fp64)."""
    accumulator = _accumulator(a.dtype)
    if a.dtype == accumulator:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=accumulator)
    return a.to(accumulator) @ b.to(accumulator)


def forward(x: Tensor, y: Tensor, scale: Tensor, columns: bool) -> tuple[Tensor, Tensor]:
    """Returns row_lse (M,) and col_lse (N,) or (0,), fp32 (fp64 for fp64). x (M, D), y (N, D), scale ()."""
    x, y = widen(x), widen(y)
    accumulator = _accumulator(x.dtype)
    row_lse = x.new_empty(x.shape[0], dtype=accumulator)
    col_lse = x.new_full((y.shape[0] if columns else 0,), -torch.inf, dtype=accumulator)
    step = _stripe_rows(y.shape[0], x.shape[0])
    for start in range(0, x.shape[0], step):
        stop = min(start + step, x.shape[0])
        logits = matmul(x[start:stop], y.T).mul_(scale)
        row_lse[start:stop] = torch.logsumexp(logits, dim=1)
        if columns:
            col_lse = torch.logaddexp(col_lse, torch.logsumexp(logits, dim=0))
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
    need_x: bool,
    need_y: bool,
    need_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns dx, dy, dscale in the accumulator's dtype; (0, D) or zero where not needed.

    g_row (M,), g_col (N,) or (0,), g_pos (M,) or (0,): gradients of row_lse, col_lse and of the logits at
    column `diagonal + row`.
    """
    dtype = x.dtype
    x, y = widen(x), widen(y)
    accumulator = _accumulator(dtype)
    m, n = x.shape[0], y.shape[0]
    # G is kept near 1 while it may be rounded to half precision, where 1/N would underflow
    unit = torch.stack([g.abs().amax() for g in (g_row, g_col, g_pos) if g.numel()]).amax()
    unit = torch.where((unit > 0) & unit.isfinite(), unit, torch.ones_like(unit)).to(accumulator)
    dx = x.new_empty(m if need_x else 0, x.shape[1], dtype=accumulator)
    dy = x.new_zeros(n if need_y else 0, x.shape[1], dtype=accumulator)
    dscale = x.new_zeros((), dtype=accumulator)
    step = _stripe_rows(n, m)
    for start in range(0, m, step):
        stop = min(start + step, m)
        dots = matmul(x[start:stop], y.T)
        logits = dots * scale
        weights = (logits - row_lse[start:stop, None]).exp_().mul_((g_row[start:stop] / unit)[:, None])
        if g_col.numel():
            weights += (logits - col_lse).exp_().mul_(g_col / unit)
        if g_pos.numel():
            weights.diagonal(diagonal + start).add_(g_pos[start:stop] / unit)
        if need_scale:
            dscale += (weights * dots).sum()
        weights = weights.to(x.dtype)
        if need_x:
            dx[start:stop] = matmul(weights, y)
        if need_y:
            dy += matmul(weights.T, x[start:stop])
    return dx.mul_(scale * unit), dy.mul_(scale * unit), dscale * unit
