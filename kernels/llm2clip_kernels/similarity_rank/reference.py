"""What `similarity_rank` means, in plain torch with the whole fp64 matrix in memory. Tests compare against this."""

from __future__ import annotations

import torch
from torch import Tensor


def similarity_rank_reference(
    x: Tensor, y: Tensor, right: Tensor, tolerance: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Counts around the best right answer of every row and column of x yᵀ.

    Args:
        x: (M, D), any floating dtype.
        y: (N, D).
        right: (M, N) bool, which columns are right answers of which rows.
        tolerance: scores that differ by no more are ties; the rounding of fp64 is always forgiven.

    Returns:
        (4, M) and (4, N) int64: wrong answers above the best right one, wrong ones tied with it, right ones tied
        with it (itself included), right ones at all.
    """
    scores = x.double() @ y.double().T
    norms = x.double().norm(dim=1)[:, None] * y.double().norm(dim=1)
    margin = tolerance + ((x.shape[1] + 8) * 2.0**-52 * norms).nan_to_num(0.0, 0.0)
    return _counts(scores, margin, right), _counts(scores.T, margin.T, right.T)


def _counts(scores: Tensor, margin: Tensor, right: Tensor) -> Tensor:
    best = scores.masked_fill(~right | scores.isnan(), -torch.inf).amax(1, keepdim=True)
    above = scores > best + margin
    tied = ~above & (scores >= best - margin)
    lost = right.any(1) & ~(right & ~scores.isnan()).any(1)
    counts = [above & ~right, tied & ~right, tied & right, right]
    none = ~right.any(1) | lost
    out = torch.stack([count.sum(1) for count in counts])
    out[:3, none] = 0
    out[0, lost] = (scores.shape[1] - right.sum(1))[lost]
    return out
