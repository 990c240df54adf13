"""What caption retrieval asks of a text encoder, whoever made it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from llm2clip.progress import Progress

WARM_UP = 8
"""Captions encoded before the clock runs."""


@dataclass(frozen=True)
class Encoded:
    """Embeddings of captions and what they took.

    Attributes:
        embeddings: (n, dim) fp32 on the CPU, not unit norm.
        seconds: tokenisation included, loading not; None where nothing was computed.
        tokens: of all captions, special tokens included, padding not; None where the encoder does not tell.
        truncated: captions that were cut to the encoder's limit; None likewise.
    """

    embeddings: Tensor
    seconds: float | None = None
    tokens: int | None = None
    truncated: int | None = None


class TextEncoder(ABC):
    """Something that embeds captions."""

    @abstractmethod
    def encode(self, texts: Sequence[str], progress: Progress) -> Encoded:
        """Embed every caption."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What the report says about it."""
