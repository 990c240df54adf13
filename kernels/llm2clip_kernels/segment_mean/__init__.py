"""Mean pooling of packed sequences, with pooling spans, optionally to unit length in the same pass."""

from __future__ import annotations

from .op import segment_mean
from .reference import segment_mean_reference

__all__ = ["segment_mean", "segment_mean_reference"]
