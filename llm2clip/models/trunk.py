"""What a vision tower needs of the network inside it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llm2clip.errors import ModelError
from llm2clip.models.layers import LayerGroup, layer_groups


class VisionTrunk(nn.Module):
    """A network from normalised pixels (B, 3, S, S) to one feature (B, dim).

    Attributes:
        kind: its `vision.kind`.
        dim: width of the feature.
        image_size: side S of the square input in pixels.
        patch_dropout: share of the patches left out in training.
        pretrained_projection: the projection (D, dim) behind the feature in the checkpoint it came from, if any.
    """

    kind: str
    dim: int
    image_size: int
    patch_dropout: float = 0.0
    pretrained_projection: Tensor | None = None

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Normalised pixels (B, 3, S, S) -> features (B, dim)."""
        raise NotImplementedError

    def config(self) -> dict[str, Any]:
        """What rebuilds the network without its weights, besides `kind` and the image size."""
        raise NotImplementedError

    def layer_groups(self) -> list[LayerGroup]:
        """Parameters in order of depth, see `layers.layer_groups`."""
        return layer_groups(self)

    def unfreeze(self) -> None:
        """Train every parameter that the feature depends on."""
        self.requires_grad_(True)

    def resized(self, image_size: int) -> VisionTrunk:
        """The network with its weights, for images of another size.

        Raises:
            ModelError: it cannot change its image size.
        """
        if image_size == self.image_size:
            return self
        raise ModelError(
            f"vision.image_size: this {self.kind} tower takes images of {self.image_size} pixels, got {image_size}"
        )

    def set_patch_dropout(self, rate: float) -> None:
        """Leave out a share of the patches of every image in training.

        Raises:
            ModelError: the network has no patches that could be left out.
        """
        if rate:
            raise ModelError(f"vision.patch_dropout needs a vision transformer, and {self.kind} is none here")

    def set_grad_checkpointing(self, enabled: bool = True) -> None:
        """Recompute each block in the backward instead of keeping its activations.

        Raises:
            ModelError: the network does not support it.
        """
        if enabled:
            raise ModelError(f"vision.grad_checkpointing: {self.kind} does not support it here")

    def native_state(self) -> dict[str, Tensor]:
        """The weights under names that do not depend on the version of the library behind them."""
        return self.state_dict()

    def load_native_state(self, state: dict[str, Tensor], source: str) -> None:
        """Load what `native_state` gave.

        Raises:
            ModelError: names or shapes differ.
        """
        from llm2clip.models.weights import check_names

        check_names(self.state_dict(), state, source)
        self.load_state_dict(state)


def freeze_unused(model: nn.Module, feature: Tensor) -> None:
    """Freeze the parameters that a feature does not depend on: DDP would wait for their gradients.

    Args:
        model: the network.
        feature: its output, with a graph.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(feature.sum(), parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is None:
            parameter.requires_grad_(False)
