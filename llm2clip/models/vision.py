"""Vision towers: one interface over EfficientNet-Lite0 and every transformers vision model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llm2clip.errors import ModelError
from llm2clip.files import read_json
from llm2clip.models import efficientnet
from llm2clip.models.hf_vision import HFVision, config_to_dict, load_hf_vision, vision_from_dict
from llm2clip.settings import VisionSettings

_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class VisionTower(nn.Module):
    """Images to one feature each.

    Attributes:
        dim: width of the feature.
        image_size: side of the square input in pixels.
        mean, std: per-channel normalisation of pixels in [0, 1] that the weights were trained with.
        frozen: no parameter is trained, and the tower stays in evaluation mode.
    """

    def __init__(
        self,
        model: efficientnet.EfficientNetLite0 | HFVision,
        *,
        dim: int,
        image_size: int,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        frozen: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.dim, self.image_size, self.mean, self.std, self.frozen = dim, image_size, mean, std, frozen
        if frozen:
            self.requires_grad_(False)
            self.eval()

    def train(self, mode: bool = True) -> VisionTower:
        """Training mode; a frozen tower stays in evaluation mode."""
        super().train(mode and not self.frozen)
        return self

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Normalised pixels (B, 3, S, S) -> features (B, dim), not normalised.

        Raises:
            ModelError: the images have another shape than (B, 3, image_size, image_size).
        """
        size = self.image_size
        if pixel_values.ndim != 4 or pixel_values.shape[1:] != (3, size, size):
            raise ModelError(
                f"the vision tower expects images (B, 3, {size}, {size}), got {tuple(pixel_values.shape)}"
            )
        if self.frozen:
            with torch.no_grad():
                return self.model(pixel_values)
        return self.model(pixel_values)

    def to_config(self) -> dict[str, Any]:
        """All that is needed to rebuild the tower without its weights and without other files."""
        common = {
            "image_size": self.image_size,
            "mean": list(self.mean),
            "std": list(self.std),
            "freeze": self.frozen,
        }
        if isinstance(self.model, HFVision):
            return {
                "kind": "transformers",
                **common,
                "pooling": self.model.pooling,
                "config": config_to_dict(self.model.model.config),
            }
        return {"kind": "efficientnet-lite0", **common, "frozen_norm": self.model.frozen_norm}


def build_vision_tower(settings: VisionSettings) -> VisionTower:
    """The tower that a configuration describes, with its pretrained weights where asked for.

    Raises:
        ModelError: a package, file or weight is missing, or the model cannot take the image size.
    """
    size = settings.image_size
    if settings.kind == "efficientnet-lite0":
        model = efficientnet.EfficientNetLite0(size, pretrained=settings.pretrained)
        return VisionTower(
            model,
            dim=efficientnet.FEATURES,
            image_size=size,
            mean=efficientnet.MEAN,
            std=efficientnet.STD,
            frozen=settings.freeze,
        )
    if not settings.path:
        raise ModelError(
            "vision.kind transformers needs vision.path: a model directory (weights) or a config.json"
        )
    tower = load_hf_vision(settings.path, size, pooling=settings.pooling, pretrained=settings.pretrained)
    mean, std = _normalisation(settings.path)
    return VisionTower(tower, dim=tower.dim, image_size=size, mean=mean, std=std, frozen=settings.freeze)


def tower_from_config(config: dict[str, Any]) -> VisionTower:
    """The tower that `VisionTower.to_config` describes, with random weights."""
    try:
        size, freeze = int(config["image_size"]), bool(config["freeze"])
        mean, std = _triple(config["mean"]), _triple(config["std"])
        model: efficientnet.EfficientNetLite0 | HFVision
        if config["kind"] == "efficientnet-lite0":
            model = efficientnet.EfficientNetLite0(size, pretrained=False, frozen_norm=config["frozen_norm"])
            dim = efficientnet.FEATURES
        elif config["kind"] == "transformers":
            model = vision_from_dict(config["config"], size, pooling=config["pooling"])
            dim = model.dim
        else:
            raise ModelError(f"unknown vision kind {config['kind']!r} in config.json")
    except (KeyError, TypeError) as error:
        raise ModelError(
            f"the vision part of config.json is damaged: {type(error).__name__} {error}"
        ) from error
    return VisionTower(model, dim=dim, image_size=size, mean=mean, std=std, frozen=freeze)


def _normalisation(
    path: str | os.PathLike[str],
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    place = Path(path)
    file = (place if place.is_dir() else place.parent) / "preprocessor_config.json"
    if file.is_file():
        values = read_json(file, ModelError)
        if isinstance(values, dict) and values.get("image_mean") and values.get("image_std"):
            return _triple(values["image_mean"]), _triple(values["image_std"])
    return _CLIP_MEAN, _CLIP_STD


def _triple(values: Any) -> tuple[float, float, float]:
    if not isinstance(values, (list, tuple)) or len(values) != 3:
        raise ModelError(f"expected three numbers per channel, got {values!r}")
    red, green, blue = (float(v) for v in values)
    return red, green, blue
