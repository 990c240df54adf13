"""Where captions become LLM embeddings in the CLIP stage: in a store, or in the LLM itself, frozen or trained along."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llm2clip.data.store import EmbeddingStore
from llm2clip.errors import ConfigError
from llm2clip.models.caption_encoder import CaptionEncoder
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.settings import TrainSettings


class CaptionSource:
    """The captions of a run (`text.source`).

    Args:
        settings: of the stage.
        device: where the LLM runs.

    Attributes:
        store: the embedding store; None where the LLM is there.
        encoder: the LLM; None with a store.

    Raises:
        ConfigError: neither a store nor an LLM is named, or both are.
        StoreError, ModelError: what is named cannot be used.
    """

    def __init__(self, settings: TrainSettings, device: torch.device) -> None:
        self._text = settings.text
        self.store: EmbeddingStore | None = None
        self.encoder: CaptionEncoder | None = None
        if self._text.source == "stored":
            if not settings.store:
                raise ConfigError("store: expected the embedding store that `llm2clip embed` made")
            self.store = EmbeddingStore.open(settings.store)
        else:
            if settings.store:
                raise ConfigError(
                    f"store: with text.source {self._text.source} the LLM embeds, leave it empty"
                )
            self.encoder = CaptionEncoder.from_settings(self._text.llm, device)

    @property
    def dim(self) -> int:
        """Width of the embeddings."""
        return self._source.dim

    def fingerprint(self) -> dict[str, Any]:
        """Identity of the encoder."""
        return self.store.fingerprint if self.store is not None else self._llm.fingerprint()

    def attach_to(self, model: LLM2CLIP) -> None:
        """Make the LLM a part of the model, which then takes tokens for embeddings."""
        if self.encoder is not None:
            lora = self._text.lora if self._text.source == "joint" else None
            model.attach_llm(self.encoder, lora=lora, token_budget=self._text.token_budget)

    def tokens(self, texts: Sequence[str]) -> Any:
        """What the model takes for captions whose embeddings are not stored; None with a store."""
        return self.encoder.tokenize(texts) if self.encoder is not None else None

    def get(self, texts: Sequence[str]) -> Tensor:
        """Embeddings (n, dim) of captions as they are now, for evaluation."""
        if self.store is not None:
            return self.store.get(texts)
        with torch.no_grad():
            return self._llm.encode(texts)

    @property
    def _source(self) -> EmbeddingStore | CaptionEncoder:
        return self.store if self.store is not None else self._llm

    @property
    def _llm(self) -> CaptionEncoder:
        assert self.encoder is not None
        return self.encoder
