"""What a vision tower needs of the network inside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from llm2clip.errors import ModelError
from llm2clip.models.layers import LayerGroup, layer_groups
from llm2clip.models.weights import check_names


class VisionTrunk(nn.Module):
    """A network from normalised pixels (B, 3, S, S) to one feature (B, dim).

    Attributes:
        kind: its `vision.kind`.
        dim: width of the feature.
        image_size: side S of the square input in pixels.
        patch_dropout: share of the patches left out in training.
        pretrained_projection: weight (D, dim) and bias (D) of the projection that its checkpoint has behind the
            feature, if any.
    """

    kind: str
    dim: int
    image_size: int
    patch_dropout: float = 0.0
    pretrained_projection: tuple[Tensor, Tensor | None] | None = None

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
        check_names(self.state_dict(), state, source)
        self.load_state_dict(state)


def no_weights(kind: str) -> str:
    """What to say where pretrained weights are asked for and none are given."""
    return (
        f"vision.kind {kind} with vision.pretrained needs vision.path, the weights, for nothing is downloaded; "
        "vision.pretrained=false begins with random ones"
    )


def freeze_unused(
    model: nn.Module, twin: Callable[[], nn.Module], feature_of: Callable[[nn.Module], Tensor]
) -> int:
    """Freeze the parameters that a feature does not depend on: DDP would wait for their gradients.

    It is asked of a twin without values, which costs nothing; a model whose code needs values is asked itself.

    Args:
        model: the network.
        twin: builds the same network.
        feature_of: runs a network on a blank image of its device; (1, dim).

    Returns:
        dim.
    """
    try:
        with torch.device("meta"):
            shadow = twin()
        dim, unused = _unused(shadow, feature_of)
        # raises for a twin with other parameters
        frozen = [model.get_parameter(name) for name in unused]
    except Exception:  # whatever its code makes of tensors without values; with values it says what is wrong
        dim, unused = _unused(model, feature_of)
        frozen = [model.get_parameter(name) for name in unused]
    for parameter in frozen:
        parameter.requires_grad_(False)
    return dim


def _unused(model: nn.Module, feature_of: Callable[[nn.Module], Tensor]) -> tuple[int, list[str]]:
    training = model.training
    model.eval()
    try:
        with torch.enable_grad():
            feature = feature_of(model)
            named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
            gradients = torch.autograd.grad(feature.sum(), [p for _, p in named], allow_unused=True)
    finally:
        model.train(training)
    unused = [name for (name, _), gradient in zip(named, gradients, strict=True) if gradient is None]
    return int(feature.shape[-1]), unused
