"""`similarity_distill` by row stripes of both matrices and torch's own GEMM: every device, every dtype.

It keeps true maxima, so no input needs another path, and never asks the device for a value. The student may be
fp64; the teacher's products are made in its own dtype and then brought to the student's accumulator.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import accumulator
from ..stripes import add_stripe_gradients, gradient_unit, matmul, stripe_rows, widen


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
    """Returns row_lse, col_lse, cross_row, cross_col, teacher_row_lse, teacher_col_lse.

    Along rows (M,), along columns (N,) or (0,); fp32 (fp64 for fp64). x (M, D), y (N, D), p (M, E), q (N, E);
    row_origin (M,) and col_origin (N,) are subtracted from S before it is averaged, and added again.
    """
    x, y, p, q = widen(x), widen(y), widen(p), widen(q)
    wide = accumulator(x.dtype)
    m, n = x.shape[0], y.shape[0]
    row_lse, cross_row, teacher_row = (x.new_empty(m, dtype=wide) for _ in range(3))
    count = n if columns else 0
    col_lse, teacher_col = (x.new_full((count,), -torch.inf, dtype=wide) for _ in range(2))
    cross_col = x.new_zeros(count, dtype=wide)
    step = stripe_rows(n, m)
    for start in range(0, m, step):
        stop = min(start + step, m)
        logits = matmul(x[start:stop], y.T).mul_(scale)
        teacher = matmul(p[start:stop], q.T).to(wide).mul_(teacher_scale)
        row_lse[start:stop] = torch.logsumexp(logits, dim=1)
        teacher_row[start:stop] = torch.logsumexp(teacher, dim=1)
        origin = row_origin[start:stop]
        cross_row[start:stop] = teacher.softmax(1).mul_(logits - origin[:, None]).sum(1) + origin
        if columns:
            col_lse = torch.logaddexp(col_lse, torch.logsumexp(logits, dim=0))
            mine = torch.logsumexp(teacher, dim=0)
            both = torch.logaddexp(teacher_col, mine)
            average = teacher.softmax(0).mul_(logits - col_origin).sum(0)
            cross_col = cross_col * (teacher_col - both).exp() + average * (mine - both).exp()
            teacher_col = both
    if columns:
        cross_col = cross_col + col_origin
    return row_lse, col_lse, cross_row, cross_col, teacher_row, teacher_col


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
    """Returns dx, dy, dscale in the accumulator's dtype; (0, D) or zero where not needed.

    g_row, g_cross_row (M,), g_col, g_cross_col (N,), g_pos (M,): gradients of the results, (0,) for none; g_row is
    always given, and without g_cross_row the teacher is not looked at.
    """
    x, y, p, q = widen(x), widen(y), widen(p), widen(q)
    wide = accumulator(x.dtype)
    m, n = x.shape[0], y.shape[0]
    taught = g_cross_row.numel() > 0
    unit = gradient_unit(g_row, g_col, g_pos, g_cross_row, g_cross_col).to(wide)
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
        if g_pos.numel():
            weights.diagonal(diagonal + start).add_(g_pos[start:stop] / unit)
        if taught:
            # added before rounding to half precision: the student's and the teacher's weights nearly cancel
            teacher = matmul(p[start:stop], q.T).to(wide).mul_(teacher_scale)
            factor = (g_cross_row[start:stop] / unit)[:, None]
            weights += (teacher - teacher_row[start:stop, None]).exp_().mul_(factor)
            if g_cross_col.numel():
                weights += (teacher - teacher_col).exp_().mul_(g_cross_col / unit)
        if need_scale:
            dscale += (weights * dots).sum()
        dy = add_stripe_gradients(weights.to(x.dtype), start, x, y, dx, dy)
    return dx.mul_(scale * unit), dy.mul_(scale * unit), dscale * unit
