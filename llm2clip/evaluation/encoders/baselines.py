"""Other people's CLIP models beside ours: open_clip and transformers, when they are installed.

They read captions with their own text towers, cut at their context length (77 tokens for CLIP), which is what a
comparison on long captions is about.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from llm2clip.errors import ConfigError, ModelError
from llm2clip.evaluation.encoders.base import DualEncoder, digest_of, no_layer
from llm2clip.models.fingerprint import tokenizer_digest
from llm2clip.settings import EvaluationPrecision, Layer

_TEXT_BATCH = 256


class _OwnTextTower(DualEncoder):
    """What both libraries' models have in common.

    Attributes:
        context_length: tokens of a caption that are read.
    """

    context_length: int
    _model: Any
    _pixels: str  # what the pixels depend on
    _tokens: str  # what the tokens depend on, besides the context length

    def image_identity(self) -> dict[str, Any]:
        return {"weights": self._weights, "transform": self._pixels, "precision": self.precision}

    def text_identity(self) -> dict[str, Any]:
        return {
            "weights": self._weights,
            "tokens": self.context_length,
            "tokenizer": self._tokens,
            "precision": self.precision,
        }

    def describe(self) -> dict[str, Any]:
        return {
            "kind": f"{type(self._model).__module__.partition('.')[0]} {type(self._model).__name__}",
            "parameters": sum(parameter.numel() for parameter in self._model.parameters()),
            "captions": f"own text tower, {self.context_length} tokens",
        }

    @cached_property
    def _weights(self) -> str:
        return digest_of(self._model)


class TransformersEncoder(_OwnTextTower):
    """A transformers model with `get_image_features` and `get_text_features` (CLIP, SigLIP, Chinese-CLIP, ...).

    Args:
        label: what the tables call it.
        path: model directory, or a name on the hub when `download` is set.
        device: where it computes.
        precision: of both sides.
        download: let it be downloaded.

    Raises:
        ModelError: it cannot be loaded, or is no image-text model.
    """

    def __init__(
        self,
        label: str,
        path: str,
        device: torch.device,
        precision: EvaluationPrecision = "fp32",
        *,
        download: bool = False,
    ) -> None:
        from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

        if not download and not Path(path).is_dir():
            raise ModelError(
                f"{label}: {path} is no directory; set download=true to fetch it from the model hub"
            )
        options: dict[str, Any] = {"local_files_only": not download, "trust_remote_code": False}
        try:
            model: Any = AutoModel.from_pretrained(path, **options)
            # the processors on PIL need no torchvision, and give what the weights were trained with
            processor: Any = AutoImageProcessor.from_pretrained(path, backend="pil", **options)
            self._tokenizer: Any = AutoTokenizer.from_pretrained(path, **options)
        except (OSError, ValueError, ImportError, KeyError) as error:
            raise ModelError(f"{label}: {path} cannot be loaded with transformers: {error}") from error
        if not hasattr(model, "get_image_features") or not hasattr(model, "get_text_features"):
            raise ModelError(f"{label}: {type(model).__name__} in {path} has no image and text features")
        self.label, self.device, self.precision = label, device, precision
        self.transform = ProcessorTransform(processor)
        self._pixels = json.dumps(processor.to_dict(), sort_keys=True, default=str)
        tokenizer = self._tokenizer
        self._tokens = (
            tokenizer_digest(tokenizer)
            if tokenizer.is_fast
            else f"{type(tokenizer).__name__} {len(tokenizer)}"
        )
        self._model = model.to(device).eval()
        config = model.config
        text = getattr(config, "text_config", config)
        # SigLIP's text tower was trained on padded captions alone, and has no attention mask
        self._siglip = str(config.model_type).startswith("siglip")
        self.context_length = int(getattr(text, "max_position_embeddings", self._tokenizer.model_max_length))

    @torch.no_grad()
    def encode_images(self, batch: Sequence[Any], layer: Layer = "projected") -> Tensor:
        inputs = {name: torch.stack([one[name] for one in batch]).to(self.device) for name in batch[0]}
        with self.autocast():
            if layer == "projected":
                return _features(self._model.get_image_features(**inputs))
            if not hasattr(self._model, "vision_model"):
                raise no_layer(self.label, layer)
            return _features(self._model.vision_model(**inputs))

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        parts = []
        for start in range(0, len(texts), _TEXT_BATCH):
            tokens = self._tokenizer(
                list(texts[start : start + _TEXT_BATCH]),
                padding="max_length" if self._siglip else True,
                truncation=True,
                max_length=self.context_length,
                return_tensors="pt",
            )
            names = ("input_ids",) if self._siglip else ("input_ids", "attention_mask")
            inputs = {name: tokens[name].to(self.device) for name in names if name in tokens}
            with self.autocast():
                parts.append(_features(self._model.get_text_features(**inputs)).cpu())
        return torch.cat(parts)


class ProcessorTransform:
    """A transformers image processor on one image, as a dictionary of tensors without the batch dimension."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor

    def __call__(self, image: Image.Image) -> dict[str, Tensor]:
        values = self._processor(images=image, return_tensors="pt")
        return {name: value[0] for name, value in values.items()}


class OpenClipEncoder(_OwnTextTower):
    """An open_clip model.

    Args:
        label: what the tables call it.
        name: `ViT-B-16@WEIGHTS`, where WEIGHTS is a file, or a tag when `download` is set; or
            `local-dir:DIRECTORY`.
        device: where it computes.
        precision: of both sides.
        download: let weights be downloaded.

    Raises:
        ConfigError: open_clip is not installed, or no weights are named.
        ModelError: the model cannot be loaded.
    """

    def __init__(
        self,
        label: str,
        name: str,
        device: torch.device,
        precision: EvaluationPrecision = "fp32",
        *,
        download: bool = False,
    ) -> None:
        try:
            import open_clip
        except ImportError:
            raise ConfigError(f"{label}: open_clip is not installed; pip install open_clip_torch") from None
        model_name, _, weights = name.partition("@")
        local = model_name.startswith("local-dir:")
        if not local and not weights:
            raise ConfigError(
                f"{label}: open_clip:{name} names no weights; write open_clip:NAME@FILE, open_clip:NAME@TAG with "
                "download=true, or open_clip:local-dir:DIRECTORY"
            )
        if not local and not download and not Path(weights).is_file():
            raise ModelError(
                f"{label}: {weights} is no file; set download=true to fetch weights by their tag"
            )
        try:
            model, transform = open_clip.create_model_from_pretrained(
                model_name, pretrained=weights or None, device=device
            )
            self._tokenizer: Any = open_clip.get_tokenizer(model_name)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise ModelError(f"{label}: open_clip cannot load {name}: {error}") from error
        self.label, self.device, self.precision, self.transform = label, device, precision, transform
        self._model = model.eval()
        self._pixels, self._tokens = str(transform), model_name
        self.context_length = int(getattr(self._tokenizer, "context_length", 77))

    @torch.no_grad()
    def encode_images(self, batch: Sequence[Any], layer: Layer = "projected") -> Tensor:
        if layer != "projected":
            raise no_layer(self.label, layer)
        with self.autocast():
            return _features(self._model.encode_image(torch.stack(list(batch)).to(self.device)))

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        parts = []
        for start in range(0, len(texts), _TEXT_BATCH):
            tokens = self._tokenizer(list(texts[start : start + _TEXT_BATCH])).to(self.device)
            with self.autocast():
                parts.append(_features(self._model.encode_text(tokens)).cpu())
        return torch.cat(parts)


def _features(output: Any) -> Tensor:
    """fp32 features; transformers 5 wraps them in an output whose pooled state is projected already."""
    value: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return value.float()
