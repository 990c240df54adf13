"""What an evaluation asks of a model, whoever made it: features of images and of captions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from llm2clip.errors import ConfigError
from llm2clip.models.fingerprint import tensors_digest
from llm2clip.settings import EvaluationPrecision, Layer

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class DualEncoder(ABC):
    """A model under evaluation.

    Attributes:
        label: what the tables call it.
        transform: decoded RGB image -> the input of `encode_images`; can be pickled.
        device: where it computes.
        precision: autocast of the image side; features are always returned in fp32.
    """

    label: str
    transform: Callable[[Image.Image], Any]
    device: torch.device
    precision: EvaluationPrecision

    @abstractmethod
    def encode_images(self, batch: Sequence[Any], layer: Layer = "projected") -> Tensor:
        """Transformed images -> (B, D) fp32, not unit norm.

        Args:
            batch: outputs of `transform`.
            layer: `projected` into the space of the captions, or the `tower`'s own feature.

        Raises:
            ConfigError: the model does not give that layer.
        """

    @abstractmethod
    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Captions -> (n, D) fp32, not unit norm."""

    @abstractmethod
    def image_identity(self) -> dict[str, Any]:
        """Everything that image features depend on, as JSON."""

    @abstractmethod
    def text_identity(self) -> dict[str, Any]:
        """Everything that caption features depend on, as JSON."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What the report says about the model."""

    def check_texts(self, texts: Sequence[str], what: str) -> None:  # noqa: B027
        """Refuse captions that cannot be encoded, before anything is computed.

        Args:
            texts: the captions.
            what: where they are from, for the message.

        Raises:
            StoreError: the embedding store lacks some.
        """

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision that images are encoded in."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=AUTOCAST[self.precision])


def digest_of(*modules: nn.Module) -> str:
    """Hash of the parameters and buffers of modules."""
    named = [
        (f"{number}.{name}", value)
        for number, module in enumerate(modules)
        for name, value in module.state_dict().items()
    ]
    return tensors_digest(named)


def no_layer(label: str, layer: Layer) -> ConfigError:
    """The error of a model that has no such layer."""
    return ConfigError(f"layer: {label} gives no {layer!r} features; use layer=projected")
