"""Any transformers vision model (CLIP, SigLIP, SigLIP 2, DINOv2, ViT, ...) as a feature extractor."""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from llm2clip.errors import ModelError
from llm2clip.files import read_json

VisionPooling = Literal["auto", "cls", "mean", "pooler"]
_POOLERS = ("pooler.", "head.")


class HFVision(nn.Module):
    """Pooled feature of a transformers vision model.

    Args:
        model: transformers vision model.
        image_size: side of the square input; position embeddings are interpolated where it differs from
            the configuration's.
        pooling: `pooler` (the model's own: CLIP's normed class token, SigLIP's attention pooling), `cls`
            (first token), `mean` (over patch tokens), `auto` (pooler where there is one, else cls).

    Raises:
        ModelError: the model lacks that pooling or cannot take the image size.
    """

    def __init__(self, model: nn.Module, image_size: int, pooling: VisionPooling = "auto") -> None:
        super().__init__()
        self.model: Any = model
        self._size = image_size
        config: Any = model.config
        patch = getattr(config, "patch_size", 1)
        self._patch = int(patch[0] if isinstance(patch, (list, tuple)) else patch)
        accepted = inspect.signature(model.forward).parameters
        self._patchify = "spatial_shapes" in accepted
        own = getattr(config, "image_size", image_size)
        resized = (int(own[0]) if isinstance(own, (list, tuple)) else int(own)) != image_size
        self._extra = (
            {"interpolate_pos_encoding": True} if resized and "interpolate_pos_encoding" in accepted else {}
        )
        self.pooling: VisionPooling = pooling
        self.dim = self._probe()

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Normalised pixels (B, 3, S, S) -> features (B, dim)."""
        output = self.model(**self._inputs(pixel_values))
        if self.pooling == "pooler":
            return output.pooler_output
        hidden: Tensor = output.last_hidden_state
        if hidden.ndim == 4:  # convolutional: (B, C, H, W)
            return hidden.mean(dim=(2, 3))
        if self.pooling == "cls":
            return hidden[:, 0]
        return hidden[:, self._prefix_tokens(hidden) :].mean(dim=1)

    def _inputs(self, pixel_values: Tensor) -> dict[str, Any]:
        if not self._patchify:
            return {"pixel_values": pixel_values, **self._extra}
        # SigLIP 2 (NaFlex) takes flattened patches, rows of (row, column, channel)
        batch, channels, side, p = (
            len(pixel_values),
            pixel_values.shape[1],
            self._size // self._patch,
            self._patch,
        )
        patches = pixel_values.reshape(batch, channels, side, p, side, p).permute(0, 2, 4, 3, 5, 1)
        count = side * side
        device = pixel_values.device
        return {
            "pixel_values": patches.reshape(batch, count, p * p * channels),
            "pixel_attention_mask": torch.ones(batch, count, dtype=torch.int64, device=device),
            "spatial_shapes": torch.full((batch, 2), side, dtype=torch.int64, device=device),
        }

    def _prefix_tokens(self, hidden: Tensor) -> int:
        """Class and register tokens in front of the patch tokens."""
        return hidden.shape[1] - (self._size // self._patch) ** 2

    def _probe(self) -> int:
        """Run one blank image: settles the pooling, finds the width, freezes what the feature ignores."""
        if self._size % self._patch:
            raise ModelError(f"image size {self._size} is not a multiple of the patch size {self._patch}")
        self.model.eval()
        with torch.enable_grad():
            try:
                output = self.model(**self._inputs(torch.zeros(1, 3, self._size, self._size)))
            except (ValueError, RuntimeError, TypeError) as error:
                raise ModelError(
                    f"{type(self.model).__name__} cannot take images of {self._size} pixels: {error}. "
                    "Use its own vision.image_size."
                ) from error
            hidden = output.last_hidden_state
            has_pooler = getattr(output, "pooler_output", None) is not None
            if self.pooling == "auto":
                self.pooling = "pooler" if has_pooler else "cls"
                if hidden.ndim == 3 and not has_pooler and self._prefix_tokens(hidden) == 0:
                    self.pooling = "mean"
            if self.pooling == "pooler" and not has_pooler:
                raise ModelError(f"{type(self.model).__name__} has no pooler; use vision.pooling cls or mean")
            if self.pooling == "cls" and hidden.ndim == 3 and self._prefix_tokens(hidden) == 0:
                raise ModelError(
                    f"{type(self.model).__name__} has no class token; use pooling mean or pooler"
                )
            feature = self(torch.zeros(1, 3, self._size, self._size)).flatten(1)
            parameters = [p for p in self.model.parameters() if p.requires_grad]
            # a parameter without gradient would stall DDP and be decayed for nothing
            gradients = torch.autograd.grad(feature.sum(), parameters, allow_unused=True)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                if gradient is None:
                    parameter.requires_grad_(False)
        return int(feature.shape[-1])


def load_hf_vision(
    path: str | os.PathLike[str], image_size: int, *, pooling: VisionPooling = "auto", pretrained: bool = True
) -> HFVision:
    """Load a vision model from a directory (weights) or a config.json (random weights).

    A directory of a whole CLIP or SigLIP model gives its vision half.

    Raises:
        ModelError: nothing usable there, or weights are missing.
    """
    place = Path(path)
    file = place / "config.json" if place.is_dir() else place
    if not file.is_file():
        raise ModelError(
            f"vision.path {place} is neither a transformers model directory nor a config.json; nothing is "
            "downloaded"
        )
    values = read_json(file, ModelError)
    if not isinstance(values, dict) or "model_type" not in values:
        raise ModelError(f"{file} is not a transformers configuration (no model_type)")
    if not place.is_dir() or not pretrained:
        return vision_from_dict(values, image_size, pooling=pooling)
    config = _vision_config(values)
    try:
        model, report = _vision_class(config).from_pretrained(
            place, config=config, dtype=torch.float32, output_loading_info=True, local_files_only=True
        )
    except Exception as error:  # transformers and safetensors raise a dozen unrelated types here
        raise ModelError(
            f"cannot load the vision model in {place}: {type(error).__name__}: {error}"
        ) from error
    missing = sorted(report.get("missing_keys", ()))
    poolerless = [name for name in missing if name.startswith(_POOLERS)]
    if len(poolerless) < len(missing):
        lost = [name for name in missing if name not in poolerless]
        raise ModelError(
            f"{place} lacks {len(lost)} weights of {type(model).__name__}: {', '.join(lost[:5])}"
        )
    if poolerless and pooling == "pooler":
        raise ModelError(f"the checkpoint in {place} has no pooler weights; use vision.pooling cls or mean")
    # classification checkpoints have no pooler; a random one would destroy the feature
    return HFVision(model, image_size, "cls" if poolerless and pooling == "auto" else pooling)


def vision_from_dict(values: dict[str, Any], image_size: int, *, pooling: VisionPooling = "auto") -> HFVision:
    """A vision model with random weights from the content of its config.json."""
    config = _vision_config(values)
    return HFVision(_vision_class(config)(config), image_size, pooling)


def config_to_dict(config: Any) -> dict[str, Any]:
    """A configuration as JSON, complete with its model_type and free of machine paths."""
    values: dict[str, Any] = config.to_dict()
    values.pop("_name_or_path", None)
    values["model_type"] = config.model_type
    return values


def _vision_config(values: dict[str, Any]) -> Any:
    from transformers import CONFIG_MAPPING, AutoConfig

    model_type = values["model_type"]
    if model_type not in CONFIG_MAPPING:
        raise ModelError(f"transformers does not know the model type {model_type!r} of vision.path")
    rest = {name: value for name, value in values.items() if name != "model_type"}
    try:
        config: Any = AutoConfig.for_model(model_type, **rest)
    except (TypeError, ValueError, KeyError) as error:
        raise ModelError(f"the configuration of the vision model is damaged: {error}") from error
    # whole image-text models keep the vision half inside
    return getattr(config, "vision_config", config)


def _vision_class(config: Any) -> Any:
    import transformers

    names = {
        "clip_vision_model": "CLIPVisionModel",
        "siglip_vision_model": "SiglipVisionModel",
        "siglip2_vision_model": "Siglip2VisionModel",
    }
    if config.model_type in names:
        return getattr(transformers, names[config.model_type])
    try:
        found = transformers.MODEL_MAPPING[type(config)]
    except KeyError:
        raise ModelError(f"transformers has no vision model of type {config.model_type!r}") from None
    return found[0] if isinstance(found, (tuple, list)) else found
