"""Vision towers: one interface over EfficientNet-Lite0, transformers, EVA02, timm and open_clip."""

from __future__ import annotations

from typing import Any, get_args

import torch
from torch import Tensor, nn

from llm2clip.errors import ModelError
from llm2clip.models.layers import LayerGroup, lock_groups
from llm2clip.models.preprocessing import Preprocessing, preprocessing_from_config
from llm2clip.models.trunk import VisionTrunk
from llm2clip.models.vision_lora import add_vision_lora
from llm2clip.settings import VisionKind, VisionSettings


class VisionTower(nn.Module):
    """Images to one feature each.

    Args:
        model: the network.
        preprocessing: what it expects of its images.

    Attributes:
        dim: width of the feature.
        frozen: no parameter is trained, and the tower stays in evaluation mode.
    """

    def __init__(self, model: VisionTrunk, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.model = model
        self.preprocessing = preprocessing
        self.dim, self.frozen = model.dim, False
        self._locked_norms: list[nn.Module] = []
        self._locked = False

    @property
    def image_size(self) -> int:
        """Side of the square input in pixels."""
        return self.preprocessing.image_size

    @property
    def mean(self) -> tuple[float, float, float]:
        """Per-channel mean of pixels in [0, 1] that the weights were trained with."""
        return self.preprocessing.mean

    @property
    def std(self) -> tuple[float, float, float]:
        """Per-channel standard deviation of pixels in [0, 1]."""
        return self.preprocessing.std

    def train(self, mode: bool = True) -> VisionTower:
        """Training mode; a frozen tower stays in evaluation mode, and so do the batch norms of locked groups."""
        super().train(mode and not self.frozen)
        for norm in self._locked_norms:
            norm.eval()
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

    def layer_groups(self) -> list[LayerGroup]:
        """Parameters in order of depth, by their names in this module, as `lock` counts them."""
        return [
            LayerGroup(group.name, tuple(f"model.{name}" for name in group.parameters))
            for group in self.model.layer_groups()
        ]

    def lock(self, unlocked_groups: int = 0) -> None:
        """Freeze all but the last groups; batch norms of locked groups keep their statistics.

        May be called again with another number, as training goes on.

        Args:
            unlocked_groups: groups of the tower that are trained, from its output end; 0 freezes it as a whole.
        """
        if self._locked:
            self.model.unfreeze()
        self._locked = True
        if unlocked_groups:
            lock_groups(self, self.layer_groups(), unlocked_groups)
        else:
            self.requires_grad_(False)
        self.frozen = not any(p.requires_grad for p in self.parameters())
        self._locked_norms = [
            module
            for module in self.modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm)
            and not any(p.requires_grad for p in module.parameters())
        ]
        self.train(self.training)

    def to_config(self) -> dict[str, Any]:
        """All that is needed to rebuild the tower without its weights and without other files."""
        return {
            "kind": self.model.kind,
            **self.preprocessing.to_config(),
            "freeze": self.frozen,
            **self.model.config(),
        }


def build_vision_tower(settings: VisionSettings) -> VisionTower:
    """The tower that a configuration describes, with its pretrained weights where asked for.

    Raises:
        ModelError: a package, file or weight is missing, or the model cannot take the image size.
    """
    trunk, preprocessing = _build(settings)
    tower = VisionTower(trunk, preprocessing.chosen(settings))
    set_up_training(tower, settings)
    return tower


def set_up_training(tower: VisionTower, settings: VisionSettings) -> None:
    """Whatever of the settings concerns training alone: adapters, locks, dropout, checkpointing, compilation.

    `settings.unlocked_groups` counts the model's projection as the first of its groups, as open_clip does.

    Raises:
        ModelError: the tower's network does not support what is asked for.
    """
    if settings.lora.rank:
        add_vision_lora(tower.model, settings.lora)
    elif settings.freeze:
        tower.lock(max(0, settings.unlocked_groups - 1))
    tower.model.set_patch_dropout(settings.patch_dropout)
    if settings.grad_checkpointing:
        tower.model.set_grad_checkpointing()
    if settings.compile:
        tower.model.compile()


def tower_from_config(config: dict[str, Any]) -> VisionTower:
    """The tower that `VisionTower.to_config` describes, with random weights.

    Raises:
        ModelError: the configuration is damaged, of a kind that this version does not know, or its package is missing.
    """
    try:
        preprocessing = preprocessing_from_config(config)
        if config["kind"] not in get_args(VisionKind):
            raise ModelError(f"unknown vision kind {config['kind']!r} in config.json")
        tower = VisionTower(_trunk_from_config(config, preprocessing.image_size), preprocessing)
        if config["freeze"]:
            tower.lock()
    except (KeyError, TypeError) as error:
        raise ModelError(
            f"the vision part of config.json is damaged: {type(error).__name__} {error}"
        ) from error
    return tower


def _build(settings: VisionSettings) -> tuple[VisionTrunk, Preprocessing]:
    """The network, with weights where asked for, and what it expects of images."""
    if settings.kind == "transformers":
        from llm2clip.models.hf_files import build_hf_vision

        return build_hf_vision(settings)
    if settings.kind == "eva02":
        from llm2clip.models.eva02_files import build_eva02

        return build_eva02(settings)
    if settings.kind == "timm":
        from llm2clip.models.timm_vision import build_timm

        return build_timm(settings)
    if settings.kind == "open_clip":
        from llm2clip.models.open_clip_vision import build_open_clip

        return build_open_clip(settings)
    from llm2clip.models.efficientnet import build_efficientnet

    return build_efficientnet(settings)


def _trunk_from_config(config: dict[str, Any], image_size: int) -> VisionTrunk:
    """The network of a saved model, with random weights."""
    if config["kind"] == "transformers":
        from llm2clip.models.hf_files import vision_from_dict

        return vision_from_dict(config["config"], image_size, pooling=config["pooling"])
    if config["kind"] == "eva02":
        from llm2clip.models.eva02 import EVA02, EVA02Config

        return EVA02(EVA02Config(**config["config"]))
    if config["kind"] == "timm":
        from llm2clip.models.timm_vision import TimmVision

        return TimmVision(config["name"], image_size, config["options"])
    if config["kind"] == "open_clip":
        from llm2clip.models.open_clip_vision import OpenClipVision

        return OpenClipVision(config["config"], image_size)
    from llm2clip.models.efficientnet import EfficientNetLite0

    return EfficientNetLite0(image_size, pretrained=False, frozen_norm=config["frozen_norm"])
