"""A student's similarity matrix against a teacher's; neither is stored."""

from __future__ import annotations

from .op import DistillTerms, similarity_distill, similarity_distill_with_rounding
from .reference import similarity_distill_reference

__all__ = [
    "DistillTerms",
    "similarity_distill",
    "similarity_distill_reference",
    "similarity_distill_with_rounding",
]
