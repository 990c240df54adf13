"""`similarity_lse` by row stripes and torch's own GEMM: every device, every dtype, fp64 included.

Always available, and the honest baseline of the fused kernels: 4 passes, but several sweeps over each stripe.
It keeps true maxima, so no input needs another path, and never asks the device for a value.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import accumulator
from ..stripes import add_stripe_gradients, gradient_unit, left_out, matmul, stripe_rows, widen


def forward(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    columns: bool,
    diagonal: int,
    x_groups: Tensor,
    y_groups: Tensor,
) -> tuple[Tensor, Tensor]:
    """Returns row_lse (M,) and col_lse (N,) or (0,), fp32 (fp64 for fp64).

    x (M, D), y (N, D), scale (); groups (M,) and (N,) or empty: equal ones are left out but for `diagonal`.
    """
    x, y = widen(x), widen(y)
    wide = accumulator(x.dtype)
    row_lse = x.new_empty(x.shape[0], dtype=wide)
    col_lse = x.new_full((y.shape[0] if columns else 0,), -torch.inf, dtype=wide)
    step = stripe_rows(y.shape[0], x.shape[0])
    for start in range(0, x.shape[0], step):
        stop = min(start + step, x.shape[0])
        logits = matmul(x[start:stop], y.T).mul_(scale)
        mask = left_out(x_groups, y_groups, start, stop, diagonal)
        if mask is not None:
            logits.masked_fill_(mask, -torch.inf)
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
    x_groups: Tensor,
    y_groups: Tensor,
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
    wide = accumulator(dtype)
    m, n = x.shape[0], y.shape[0]
    unit = gradient_unit(g_row, g_col, g_pos).to(wide)
    dx = x.new_empty(m if need_x else 0, x.shape[1], dtype=wide)
    dy = x.new_empty(n if need_y else 0, x.shape[1], dtype=wide)
    dscale = x.new_zeros((), dtype=wide)
    step = stripe_rows(n, m)
    for start in range(0, m, step):
        stop = min(start + step, m)
        dots = matmul(x[start:stop], y.T)
        logits = dots * scale
        weights = (logits - row_lse[start:stop, None]).exp_().mul_((g_row[start:stop] / unit)[:, None])
        if g_col.numel():
            weights += (logits - col_lse).exp_().mul_(g_col / unit)
        mask = left_out(x_groups, y_groups, start, stop, diagonal)
        if mask is not None:
            weights.masked_fill_(mask, 0.0)
        if g_pos.numel():
            weights.diagonal(diagonal + start).add_(g_pos[start:stop] / unit)
        if need_scale:
            dscale += (weights * dots).sum()
        dy = add_stripe_gradients(weights.to(x.dtype), start, x, y, dx, dy)
    return dx.mul_(scale * unit), dy.mul_(scale * unit), dscale * unit
