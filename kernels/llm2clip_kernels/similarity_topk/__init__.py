"""The best columns of every row of a similarity matrix that is never stored."""

from __future__ import annotations

from .op import SimilarityTopK, similarity_topk, similarity_topk_stream
from .reference import similarity_topk_reference

__all__ = ["SimilarityTopK", "similarity_topk", "similarity_topk_reference", "similarity_topk_stream"]
