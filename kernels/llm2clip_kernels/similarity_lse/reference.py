"""What `similarity_lse` means, in plain torch with the whole matrix in memory. Tests compare against this."""

from __future__ import annotations

import torch
from torch import Tensor


def similarity_lse_reference(
    x: Tensor,
    y: Tensor,
    scale: Tensor | float,
    x_groups: Tensor | None = None,
    y_groups: Tensor | None = None,
    diagonal: int = -1,
) -> tuple[Tensor, Tensor]:
    """Row and column log-sum-exp of S = scale · x yᵀ; differentiable, O(M·N) memory.

    Args:
        x: (M, D), any floating dtype; the result has its dtype.
        y: (N, D), dtype of x.
        scale: multiplier of the dot products (already exponentiated, not a temperature).
        x_groups, y_groups: (M,) and (N,) integer ids: pairs of equal ones, 0 or more, are left out.
        diagonal: pairs (i, diagonal + i) are never left out; -1 for none.

    Returns:
        (M,) logsumexp over the columns, and (N,) logsumexp over the rows.
    """
    logits = scale * (x @ y.T)
    if x_groups is not None and y_groups is not None:
        mask = (x_groups[:, None] == y_groups) & (x_groups >= 0)[:, None]
        if diagonal >= 0:
            mask.diagonal(diagonal).fill_(False)
        logits = logits.masked_fill(mask, -torch.inf)
    return torch.logsumexp(logits, dim=1), torch.logsumexp(logits, dim=0)
