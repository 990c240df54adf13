"""The module that a CLIP stage trains: a batch to the named outputs that its loss needs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llm2clip.data.images import normalize_pixels
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.settings import TrainSettings
from llm2clip.training.clip_batch import ImageTexts
from llm2clip_kernels import l2_normalize

# what a batch carries for the loss that no tower changes
_CONSTANTS = ("teacher_image", "teacher_text", "teacher_tower")


class TwoTowers(nn.Module):
    """`ImageTexts` -> the outputs that `ClipLoss` names, as far as the settings need them.

    Parameters that none of these outputs depends on are frozen: they would get no gradient.

    Args:
        model: the towers.
        settings: of the stage.

    Attributes:
        image, text, tower: which features are computed.
    """

    def __init__(self, model: LLM2CLIP, settings: TrainSettings) -> None:
        super().__init__()
        self.model = model
        loss, distill = settings.loss, settings.loss.distill
        pairs = loss.kind != "none" or distill.similarity > 0
        self.image = pairs or any(distill.image.values())
        self.text = pairs or any(distill.text.values())
        self.tower = any(distill.tower.values())
        self._several = settings.data.captions.per_image > 1
        self._scaled = loss.kind in ("softmax", "sigmoid") or distill.similarity > 0
        self._clip_text = loss.kind != "none" and model.clip_text is not None and model.text_fusion is None
        second_text = self._clip_text or (self.text and model.text_fusion is not None)
        used = {
            "vision_model.": (self.image or self.tower) and not settings.features,
            "visual_projection.": self.image,
            "text_adapter.": self.text,
            "caption_encoder.": self.text,
            "clip_text.": second_text,
            "text_projection.": second_text,
            "text_fusion.": self.text,
            "logit_": self._scaled,
        }
        for name, parameter in model.named_parameters():
            if not next((needed for prefix, needed in used.items() if name.startswith(prefix)), True):
                parameter.requires_grad_(False)

    def forward(self, batch: ImageTexts) -> dict[str, Tensor]:
        model, outputs = self.model, dict[str, Tensor]()
        if self.image or self.tower:
            features = self._tower_features(batch)
            if self.image:
                outputs["image"] = _unit(model.visual_projection(features))
            if self.tower:
                outputs["tower"] = _unit(features)
        if self.text:
            captions: Any = batch.embeddings if batch.tokens is None else batch.tokens
            outputs["text"] = model.get_text_features(captions, batch.clip_tokens, normalize=True)
        if self._clip_text:
            outputs["clip_text"] = model.get_clip_text_features(batch.clip_tokens, normalize=True)
        if self._scaled:
            outputs["scale"] = model.logit_scale.clamp(max=model.settings.logit_scale_max).exp()
            if model.logit_bias is not None:
                # not the parameter itself: an output may be changed in place
                outputs["bias"] = model.logit_bias.clone()
        if batch.meeting:
            outputs["groups"] = batch.groups
        if self._several and batch.owners is not None:
            outputs["owners"] = batch.owners
        return outputs | {name: t for name in _CONSTANTS if (t := getattr(batch, name)) is not None}

    def _tower_features(self, batch: ImageTexts) -> Tensor:
        if batch.features is not None:
            return batch.features
        vision, pixels = self.model.vision_model, batch.pixels
        assert pixels is not None
        return vision(normalize_pixels(pixels, vision.mean, vision.std))


def _unit(features: Tensor) -> Tensor:
    # the loss stays fp32 where autocast rounds the towers
    return l2_normalize(features, dtype=torch.promote_types(features.dtype, torch.float32))
