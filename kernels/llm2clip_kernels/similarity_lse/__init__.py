"""Row and column log-sum-exp of a similarity matrix that is never stored."""

from __future__ import annotations

from .op import similarity_lse, similarity_lse_with_positives
from .reference import similarity_lse_reference

__all__ = ["similarity_lse", "similarity_lse_reference", "similarity_lse_with_positives"]
