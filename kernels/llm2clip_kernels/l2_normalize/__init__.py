"""Rows to unit length, with the cast to another dtype, one pass forward and one backward."""

from __future__ import annotations

from .op import l2_normalize
from .reference import l2_normalize_reference

__all__ = ["l2_normalize", "l2_normalize_reference"]
