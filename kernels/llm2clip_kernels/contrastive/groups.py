"""Pairs that share a group id: who they are, how many, and the sums of their logits, in O(N·D).

Σ_j S_ij over the columns j of row i's group is scale · <x_i, Σ_j y_j>: one sum per group, no matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import accumulator


def group_sizes(ids: Tensor, others: Tensor) -> Tensor:
    """How many of `others` (N,) share each of `ids` (M,); (M,) int64, 0 for negative ids."""
    ordered = others.sort().values
    below = torch.searchsorted(ordered, ids)
    through = torch.searchsorted(ordered, ids, right=True)
    return torch.where(ids >= 0, through - below, torch.zeros_like(below))


def group_sums(rows: Tensor, row_ids: Tensor, ids: Tensor) -> Tensor:
    """Σ of the rows whose id equals each of `ids`.

    Args:
        rows: (N, D).
        row_ids: (N,) int64.
        ids: (M,) int64; a negative id equals nothing.

    Returns:
        (M, D), dtype of `rows`. Shapes never depend on the ids, so nothing waits for the device.
    """
    ordered = row_ids.sort().values
    # a group's place is where its first member stands in sorted order
    place = torch.searchsorted(ordered, row_ids)
    # index_put sorts on CUDA: the same sums every run, which index_add's atomics would not give
    sums = torch.zeros_like(rows).index_put((place,), rows, accumulate=True)
    wanted = torch.searchsorted(ordered, ids).clamp(max=row_ids.shape[0] - 1)
    found = (ordered[wanted] == ids) & (ids >= 0)
    return torch.where(found[:, None], sums[wanted], 0.0)


def group_logit_sums(
    x: Tensor, y: Tensor, scale: Tensor, x_ids: Tensor, y_ids: Tensor, paired: bool
) -> tuple[Tensor, Tensor]:
    """Sums of the logits between members of one group, by row and by column of S = scale · x yᵀ.

    Args:
        x, y: (M, D), (N, D).
        scale: 0-dim.
        x_ids, y_ids: (M,), (N,) int64.
        paired: x_i and y_i are a pair, which is left out of both sums; its logit is known better elsewhere.

    Returns:
        (M,) and (N,), fp32 (fp64 for fp64).
    """
    wide = accumulator(x.dtype)
    x, y = x.to(wide), y.to(wide)
    partners, column_partners = group_sums(y, y_ids, x_ids), group_sums(x, x_ids, y_ids)
    if paired:
        # a group of one pair leaves exact zeros
        own = ((x_ids == y_ids) & (x_ids >= 0)).to(wide)[:, None]
        partners, column_partners = partners - own * y, column_partners - own * x
    return scale * (x * partners).sum(1), scale * (y * column_partners).sum(1)
