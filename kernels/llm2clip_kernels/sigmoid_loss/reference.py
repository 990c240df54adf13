"""What the sigmoid loss means, in plain torch with the whole matrix in memory. Tests compare against this."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def sigmoid_loss_reference(
    x: Tensor,
    y: Tensor,
    scale: Tensor | float,
    bias: Tensor | float,
    x_groups: Tensor | None = None,
    y_groups: Tensor | None = None,
    diagonal: int = 0,
) -> Tensor:
    """Per row, Σ_j softplus(-z_ij (scale · x_i·y_j + bias)), z = 1 for positive pairs, -1 for the others.

    SigLIP (arXiv 2303.15343, eq. 1 and algorithm 1). Differentiable, O(M·N) memory.

    Args:
        x: (M, D), any floating dtype; the result has its dtype.
        y: (N, D), dtype of x.
        scale: multiplier of the dot products (already exponentiated).
        bias: added to every logit.
        x_groups, y_groups: (M,) and (N,) ids; pairs with equal ids of at least 0 are positive. None or empty:
            the pairs (i, diagonal + i).
        diagonal: column of row 0's positive.

    Returns:
        (M,) losses.
    """
    logits = scale * (x @ y.T) + bias
    if x_groups is not None and y_groups is not None and x_groups.numel():
        positive = (x_groups[:, None] == y_groups) & (x_groups >= 0)[:, None]
    else:
        positive = torch.zeros_like(logits, dtype=torch.bool)
        positive.diagonal(diagonal).fill_(True)
    return -F.logsigmoid(torch.where(positive, logits, -logits)).sum(1)
