"""LLM2CLIP models: images through the tower, embeddings of captions through the adapter."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from llm2clip.errors import StoreError
from llm2clip.evaluation.encoders.base import DualEncoder, digest_of
from llm2clip.evaluation.encoders.captions import CaptionSource
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.settings import EvaluationPrecision, Layer

_TEXT_BATCH = 1024


class LLM2CLIPEncoder(DualEncoder):
    """An LLM2CLIP model with the captions of its LLM.

    Args:
        label: what the tables call it.
        model: the model, on its device.
        captions: embeddings of captions.
        precision: of the image side.

    Raises:
        StoreError: the embeddings have another width than the model takes.
    """

    def __init__(
        self, label: str, model: LLM2CLIP, captions: CaptionSource, precision: EvaluationPrecision = "fp32"
    ) -> None:
        self.label, self.model, self.captions, self.precision = label, model.eval(), captions, precision
        self.device = next(model.parameters()).device
        self.transform = model.vision_model.preprocessing.transform()
        if captions.dim is not None and captions.dim != model.llm_dim:
            raise StoreError(
                f"{label} takes LLM embeddings of dimension {model.llm_dim}, but those of {captions.describe()} have "
                f"{captions.dim}. Use the LLM that the model was trained with."
            )

    @torch.no_grad()
    def encode_images(self, batch: Sequence[Any], layer: Layer = "projected") -> Tensor:
        pixels = torch.stack(list(batch)).to(self.device)
        with self.autocast():
            features = self.model.vision_model(pixels)
            if layer == "projected":
                features = self.model.visual_projection(features)
        return features.float()

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        embeddings = self.captions(texts)
        parts = []
        for start in range(0, len(texts), _TEXT_BATCH):
            rows = slice(start, start + _TEXT_BATCH)
            clip_tokens = None
            if self.model.text_fusion is not None and self.model.clip_text is not None:
                clip_tokens = self.model.clip_text.tokenize(list(texts[rows])).to(self.device)
            features = self.model.get_text_features(embeddings[rows].to(self.device), clip_tokens)
            parts.append(features.float().cpu())
        return torch.cat(parts)

    def check_texts(self, texts: Sequence[str], what: str) -> None:
        self.captions.check(texts, what)

    def image_identity(self) -> dict[str, Any]:
        return {
            "weights": self._image_weights,
            "transform": repr(self.transform),
            "precision": self.precision,
        }

    def text_identity(self) -> dict[str, Any]:
        return {"weights": self._text_weights, **self.captions.identity()}

    @cached_property
    def _image_weights(self) -> str:
        return digest_of(self.model.vision_model, self.model.visual_projection)

    @cached_property
    def _text_weights(self) -> str:
        model = self.model
        beside = (model.clip_text, model.text_projection, model.text_fusion)
        return digest_of(*(part for part in (model.text_adapter, *beside) if part is not None))

    def describe(self) -> dict[str, Any]:
        model = self.model
        return {
            "kind": "LLM2CLIP",
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "embed_dim": model.settings.embed_dim,
            "image_size": model.vision_model.image_size,
            "captions": self.captions.describe(),
        }
