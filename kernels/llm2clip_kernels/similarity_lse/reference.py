"""What `similarity_lse` means, in plain torch with the whole matrix in memory. Tests compare against this."""

from __future__ import annotations

import torch
from torch import Tensor


def similarity_lse_reference(x: Tensor, y: Tensor, scale: Tensor | float) -> tuple[Tensor, Tensor]:
    """Row and column log-sum-exp of S = scale · x yᵀ; differentiable, O(M·N) memory.

    Args:
        x: (M, D), any floating dtype; the result has its dtype.
        y: (N, D), dtype of x.
        scale: multiplier of the dot products (already exponentiated, not a temperature).

    Returns:
        (M,) logsumexp over the columns, and (N,) logsumexp over the rows.
    """
    logits = scale * (x @ y.T)
    return torch.logsumexp(logits, dim=1), torch.logsumexp(logits, dim=0)
