"""The measures of retrieval, from ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

from torch import Tensor

from ..checks import check_integers


class RetrievalMetrics(TypedDict):
    """Measures over the queries that have a right answer; NaN where none has."""

    queries: int
    recall: dict[int, float]
    mrr: float
    median_rank: float
    mean_rank: float


def retrieval_metrics(rank: Tensor, *, ks: Sequence[int] = (1, 5, 10)) -> RetrievalMetrics:
    """Recall at k, mean reciprocal rank, median and mean rank.

    Args:
        rank: (Q,) integers from 1, as `similarity_rank` returns them; 0 (no right answer) is left out.
        ks: recall is the share of ranks <= k; at 1 it is the accuracy within the batch.

    Returns:
        Plain numbers. The median of an even number of ranks is the mean of the two in the middle.

    Raises:
        TypeError, ValueError: `rank` is no 1-D integer tensor, or a k is below 1.
    """
    check_integers(rank, "rank", "retrieval_metrics")
    if rank.dim() != 1:
        raise ValueError(f"retrieval_metrics: rank must be 1-D, got shape {tuple(rank.shape)}")
    if any(k < 1 for k in ks):
        raise ValueError(f"retrieval_metrics: every k must be 1 or more, got {tuple(ks)}")
    known = rank[rank > 0].double()
    ordered = known.sort().values
    count = known.numel()
    middle = ordered[(count - 1) // 2 : count // 2 + 1] if count else ordered
    return {
        "queries": count,
        "recall": {k: (known <= k).double().mean().item() for k in ks},
        "mrr": known.reciprocal().mean().item(),
        "median_rank": middle.mean().item(),
        "mean_rank": known.mean().item(),
    }
