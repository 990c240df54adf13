"""Attention inside the sequences of a packed batch, never across them."""

from __future__ import annotations

from .op import Backend, packed_attention
from .reference import packed_attention_reference

__all__ = ["Backend", "packed_attention", "packed_attention_reference"]
