"""`similarity_lse` with the whole matrix in memory, for batches so small that this is the fastest way."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import accumulator
from ..stripes import left_out


def forward(
    x: Tensor, y: Tensor, scale: Tensor, columns: bool, diagonal: int, x_groups: Tensor, y_groups: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """Returns what `similarity_lse_with_positives` does; autograd differentiates it.

    x (M, D), y (N, D), scale () fp32 (fp64 for fp64); groups (M,) and (N,) int64 or empty. One matmul serves
    both directions. Half-precision inputs are widened: the products are those the kernels accumulate.
    """
    wide = accumulator(x.dtype)
    logits = (x.to(wide) @ y.to(wide).T) * scale
    pos = logits.diagonal(diagonal)[: x.shape[0]] if diagonal >= 0 else None
    mask = left_out(x_groups, y_groups, 0, x.shape[0], diagonal)
    if mask is not None:
        # the smallest number instead of -inf, whose softmax would be NaN where nothing is left
        logits = logits.masked_fill(mask, torch.finfo(wide).min)
    row = torch.logsumexp(logits, dim=1)
    col = torch.logsumexp(logits, dim=0) if columns else None
    if mask is not None:
        row = row.masked_fill(mask.all(dim=1), -torch.inf)
        col = None if col is None else col.masked_fill(mask.all(dim=0), -torch.inf)
    sizes = x.shape[0] + (y.shape[0] if columns else 0) + (0 if pos is None else x.shape[0])
    return row, col, pos, x.new_zeros(sizes, dtype=wide)
