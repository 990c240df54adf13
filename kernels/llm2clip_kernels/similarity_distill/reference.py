"""What `similarity_distill` means, in plain torch with both matrices in memory. Tests compare against this."""

from __future__ import annotations

import torch
from torch import Tensor


def similarity_distill_reference(
    x: Tensor, y: Tensor, scale: Tensor | float, p: Tensor, q: Tensor, teacher_scale: Tensor | float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-sum-exps of S = scale · x yᵀ, and S averaged under the softmax of T = teacher_scale · p qᵀ.

    Args:
        x, y: (M, D), (N, D) student features, any floating dtype; the results have theirs.
        scale: multiplier of the student's dot products.
        p, q: (M, E), (N, E) teacher features; no gradient flows to them.
        teacher_scale: multiplier of the teacher's dot products.

    Returns:
        (M,) logsumexp of S over columns; (N,) over rows; (M,) Σ_j softmax_j(T_i·) S_ij; (N,)
        Σ_i softmax_i(T_·j) S_ij.
    """
    logits = scale * (x @ y.T)
    with torch.no_grad():
        teacher = (teacher_scale * (p @ q.T)).to(logits.dtype)
        by_row, by_col = teacher.softmax(1), teacher.softmax(0)
    return (
        torch.logsumexp(logits, dim=1),
        torch.logsumexp(logits, dim=0),
        (by_row * logits).sum(1),
        (by_col * logits).sum(0),
    )
