"""The CLIP model: vision tower and projection on one side, adapter on LLM embeddings on the other."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llm2clip.errors import ModelError
from llm2clip.files import atomic_path, read_json, write_json, write_text
from llm2clip.models.adapter import TextAdapter
from llm2clip.models.vision import VisionTower, build_vision_tower, tower_from_config
from llm2clip.settings import ModelSettings
from llm2clip_kernels import l2_normalize

_FORMAT = 1
# CLIP's: ln(1 / 0.07)
_LOG_SCALE = 2.6592600


class LLM2CLIP(nn.Module):
    """Images and LLM caption embeddings in one space.

    Args:
        settings: sizes and the vision tower.
        llm_dim: width of the LLM embeddings.
        fingerprint: `CaptionEncoder.fingerprint()` of the encoder whose embeddings the model takes, as
            found in the embedding store; None when unknown.
        vision: a tower to use instead of the one that `settings.vision` describes.

    Attributes:
        vision_model, visual_projection (no bias), text_adapter: the parts, named as in published checkpoints.
        logit_scale: logarithm of the scale; `forward` returns it exponentiated and bounded.
        logit_bias: added to every logit by the sigmoid loss; None where `settings.logit_bias_init` is.
    """

    def __init__(
        self,
        settings: ModelSettings,
        llm_dim: int,
        fingerprint: dict[str, Any] | None = None,
        *,
        vision: VisionTower | None = None,
    ) -> None:
        super().__init__()
        self.settings = settings
        self.llm_dim = llm_dim
        self.fingerprint = fingerprint
        self.vision_model = build_vision_tower(settings.vision) if vision is None else vision
        self.visual_projection = nn.Linear(self.vision_model.dim, settings.embed_dim, bias=False)
        # unit-variance features give unit-variance projections, whatever the tower's width
        nn.init.normal_(self.visual_projection.weight, std=self.vision_model.dim**-0.5)
        self.text_adapter = TextAdapter(
            llm_dim,
            settings.embed_dim,
            settings.adapter_depth,
            settings.adapter_expansion,
            settings.adapter_dropout,
        )
        scale, bias = settings.logit_scale_init, settings.logit_bias_init
        self.logit_scale = nn.Parameter(torch.tensor(_LOG_SCALE if scale is None else float(scale)))
        self.logit_bias: nn.Parameter | None = None
        if bias is not None:
            self.logit_bias = nn.Parameter(torch.tensor(float(bias)))

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Normalised pixels (B, 3, S, S) -> (B, D), not unit norm."""
        return self.visual_projection(self.vision_model(pixel_values))

    def get_text_features(self, llm_embeddings: Tensor) -> Tensor:
        """LLM embeddings (B, llm_dim) -> (B, D), not unit norm."""
        return self.text_adapter(llm_embeddings)

    def forward(self, pixel_values: Tensor, llm_embeddings: Tensor) -> dict[str, Tensor]:
        """Features for a contrastive loss.

        Returns:
            image_features (B, D) and text_features (B, D) of unit norm, fp32 under autocast too, logit_scale (0-dim,
            a multiplier), and logit_bias (0-dim) where the model has one.
        """
        outputs = {
            "image_features": _unit(self.get_image_features(pixel_values)),
            "text_features": _unit(self.get_text_features(llm_embeddings)),
            "logit_scale": self.logit_scale.clamp(max=self.settings.logit_scale_max).exp(),
        }
        if self.logit_bias is not None:
            # not the parameter itself: an output may be changed in place
            outputs["logit_bias"] = self.logit_bias.clone()
        return outputs

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Keep the parameter itself within [0, logit_scale_max]; call it after an optimizer step."""
        self.logit_scale.clamp_(0.0, self.settings.logit_scale_max)

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write model.safetensors, config.json, preprocessor_config.json and a model card, atomically."""
        from safetensors.torch import save_file

        vision = self.vision_model
        with atomic_path(path) as folder:
            folder.mkdir()
            tensors = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
            write_json(folder / "config.json", self._config())
            write_json(
                folder / "preprocessor_config.json",
                {
                    "size": {"height": vision.image_size, "width": vision.image_size},
                    "image_mean": list(vision.mean),
                    "image_std": list(vision.std),
                    "do_resize": True,
                    "do_rescale": True,
                    "do_normalize": True,
                    "do_convert_rgb": True,
                },
            )
            write_text(folder / "README.md", self._card())

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], device: str | torch.device = "cpu") -> LLM2CLIP:
        """Load a model that `save_pretrained` wrote; needs no other file than those in the directory.

        Raises:
            ModelError: the directory, config.json or the weights cannot be used; weights that are missing,
                unexpected or of another shape are listed.
        """
        folder = Path(path)
        if not (folder / "config.json").is_file():
            raise ModelError(f"{folder} is not an LLM2CLIP model directory: it has no config.json")
        config = read_json(folder / "config.json", ModelError)
        if not isinstance(config, dict) or config.get("model_type") != "llm2clip":
            found = config.get("model_type") if isinstance(config, dict) else type(config).__name__
            raise ModelError(f"{folder}/config.json is not of model_type llm2clip but {found!r}")
        if config.get("format") != _FORMAT:
            raise ModelError(
                f"{folder} has format {config.get('format')!r}, this version reads {_FORMAT}; upgrade "
                "llm2clip"
            )
        names = {field.name for field in dataclasses.fields(ModelSettings)} - {"vision", "logit_bias_init"}
        try:
            # models saved before there was a sigmoid loss do not say that they have no bias
            settings = ModelSettings(
                **{name: config[name] for name in names}, logit_bias_init=config.get("logit_bias_init")
            )
            model = cls(
                settings,
                int(config["llm_dim"]),
                config["text_encoder"],
                vision=tower_from_config(config["vision"]),
            )
        except (KeyError, TypeError) as error:
            raise ModelError(f"{folder}/config.json is damaged: {type(error).__name__} {error}") from error
        load_weights(model, folder / "model.safetensors")
        return model.to(device).eval()

    def _config(self) -> dict[str, Any]:
        settings = {
            field.name: getattr(self.settings, field.name)
            for field in dataclasses.fields(ModelSettings)
            if field.name != "vision"
        }
        return {
            "model_type": "llm2clip",
            "format": _FORMAT,
            "llm_dim": self.llm_dim,
            **settings,
            "vision": self.vision_model.to_config(),
            "text_encoder": self.fingerprint,
        }

    def _card(self) -> str:
        count = sum(p.numel() for p in self.parameters())
        llm = (self.fingerprint or {}).get("model_type", "an unnamed LLM")
        return (
            "---\nlibrary_name: llm2clip\npipeline_tag: zero-shot-image-classification\n---\n\n# LLM2CLIP "
            "model\n\n"
            f"{count:,} parameters, shared space of {self.settings.embed_dim} dimensions, images of "
            f"{self.vision_model.image_size} pixels. The text side takes embeddings of width "
            f"{self.llm_dim} made by "
            f"the {llm} caption encoder whose fingerprint is `text_encoder` in config.json; embeddings of "
            "another "
            "encoder mean nothing to it.\n\n```python\nfrom llm2clip.models import LLM2CLIP\n\n"
            "model = LLM2CLIP.from_pretrained(path)\nimages = model.get_image_features(pixel_values)\n"
            "texts = model.get_text_features(encoder.encode(captions))\n```\n"
        )


def _unit(features: Tensor) -> Tensor:
    # the loss stays fp32 where autocast rounds the towers
    return l2_normalize(features, dtype=torch.promote_types(features.dtype, torch.float32))


def load_weights(model: nn.Module, file: str | os.PathLike[str]) -> None:
    """Load a safetensors file strictly.

    Raises:
        ModelError: unreadable, or names and shapes differ; every kind of difference is counted and shown.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(file)
    except FileNotFoundError:
        raise ModelError(f"{os.fspath(file)} does not exist; the model directory is incomplete") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{os.fspath(file)} is damaged or half-copied: {error}") from error
    check_state(model, tensors, os.fspath(file))
    model.load_state_dict(tensors)


def check_state(model: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Raise ModelError unless names and shapes of `tensors` are exactly those of `model`."""
    expected = model.state_dict()
    missing = sorted(set(expected) - set(tensors))
    unexpected = sorted(set(tensors) - set(expected))
    shapes = [
        f"{name}: file {tuple(tensors[name].shape)}, model {tuple(expected[name].shape)}"
        for name in sorted(set(expected) & set(tensors))
        if tensors[name].shape != expected[name].shape
    ]
    parts = [
        f"{len(items)} {kind} ({'; '.join(items[:10])}{'; ...' if len(items) > 10 else ''})"
        for kind, items in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if items
    ]
    if parts:
        raise ModelError(
            f"{source} does not fit the model: {', '.join(parts)}. Load it with the configuration it was "
            "saved with."
        )
