"""A linear layer with a low-rank update, in one op."""

from __future__ import annotations

from .op import lora_add, lora_linear
from .reference import lora_linear_reference

__all__ = ["lora_add", "lora_linear", "lora_linear_reference"]
