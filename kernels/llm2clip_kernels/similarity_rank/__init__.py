"""Where the right answers stand in a similarity matrix that is never stored."""

from __future__ import annotations

from .metrics import RetrievalMetrics, retrieval_metrics
from .op import RankCounts, similarity_rank, similarity_rank_counts
from .reference import similarity_rank_reference
from .stream import similarity_rank_stream

__all__ = [
    "RankCounts",
    "RetrievalMetrics",
    "retrieval_metrics",
    "similarity_rank",
    "similarity_rank_counts",
    "similarity_rank_reference",
    "similarity_rank_stream",
]
