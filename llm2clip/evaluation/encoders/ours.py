"""LLM2CLIP models: images through the tower, embeddings of captions through the adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llm2clip.data.images import ImageTransform
from llm2clip.errors import StoreError
from llm2clip.evaluation.encoders.base import DualEncoder, digest_of
from llm2clip.evaluation.encoders.captions import CaptionSource
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.settings import EvaluationPrecision, Layer

_TEXT_BATCH = 4096


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
        vision = model.vision_model
        # towers that know how their images are prepared say so themselves
        prepared: Any = getattr(vision, "preprocessing", None)
        self.transform = (
            ImageTransform(vision.image_size, vision.mean, vision.std)
            if prepared is None
            else prepared.transform()
        )
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
        parts = self.captions(texts).split(_TEXT_BATCH)
        return torch.cat([self.model.get_text_features(part.to(self.device)).float().cpu() for part in parts])

    def check_texts(self, texts: Sequence[str], what: str) -> None:
        self.captions.check(texts, what)

    def image_identity(self) -> dict[str, Any]:
        return {
            "weights": digest_of(self.model.vision_model, self.model.visual_projection),
            "transform": repr(self.transform),
            "precision": self.precision,
        }

    def text_identity(self) -> dict[str, Any]:
        return {"weights": digest_of(self.model.text_adapter), **self.captions.identity()}

    def describe(self) -> dict[str, Any]:
        model = self.model
        return {
            "kind": "LLM2CLIP",
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "embed_dim": model.settings.embed_dim,
            "image_size": model.vision_model.image_size,
            "captions": self.captions.describe(),
        }
