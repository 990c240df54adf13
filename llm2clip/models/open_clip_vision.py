"""Vision towers of open_clip, where it is installed: its own ViTs and ResNets, and timm's models under its names."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llm2clip.errors import ModelError
from llm2clip.files import read_json
from llm2clip.models.layers import LayerGroup, layer_groups
from llm2clip.models.open_clip_names import CONFIG, WEIGHTS, from_preprocess
from llm2clip.models.positions import resized_state
from llm2clip.models.preprocessing import Preprocessing
from llm2clip.models.timm_vision import set_input_size, timm_groups
from llm2clip.models.trunk import VisionTrunk, freeze_unused, no_weights
from llm2clip.models.weights import check_names, read_tensors
from llm2clip.settings import VisionSettings

# open_clip builds whole models only
_NO_TEXT = {"context_length": 4, "vocab_size": 8, "width": 8, "heads": 1, "layers": 1}


def require_open_clip() -> Any:
    """The open_clip package.

    Raises:
        ModelError: it is not installed.
    """
    try:
        import open_clip
    except ImportError as error:
        raise ModelError("this vision tower needs open_clip: pip install open_clip_torch") from error
    return open_clip


class OpenClipVision(VisionTrunk):
    """The feature of an open_clip tower before its projection (of a ResNet: behind its attention pooling).

    Args:
        config: `embed_dim`, `vision_cfg` and `quick_gelu` of open_clip's model configuration.
        image_size: side of the square input.
    """

    kind = "open_clip"

    def __init__(self, config: dict[str, Any], image_size: int) -> None:
        super().__init__()
        self.settings = copy.deepcopy(config)
        self.image_size = image_size
        self.visual = _tower(config, image_size)
        self.dim = self._probe()

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Normalised pixels (B, 3, S, S) -> (B, dim)."""
        return self.visual(pixel_values)

    def config(self) -> dict[str, Any]:
        """open_clip's configuration of the tower."""
        return {"config": copy.deepcopy(self.settings)}

    def layer_groups(self) -> list[LayerGroup]:
        """The groups that open_clip locks by."""
        if hasattr(self.visual, "trunk"):
            return timm_groups(self.visual.trunk, "visual.trunk.")
        return layer_groups(self)

    def unfreeze(self) -> None:
        """Train every parameter that the feature depends on."""
        self.requires_grad_(True)
        self._probe()

    def resized(self, image_size: int) -> OpenClipVision:
        """The tower for images of another size, its position embeddings interpolated."""
        if image_size == self.image_size:
            return self
        if hasattr(self.visual, "trunk"):
            set_input_size(self.visual.trunk, image_size, self.settings["vision_cfg"]["timm_model_name"])
            self.image_size = image_size
            return self
        patch = self.settings["vision_cfg"].get("patch_size", 16)
        if image_size % patch:
            raise ModelError(f"image size {image_size} is not a multiple of the patch size {patch}")
        other = OpenClipVision(self.settings, image_size)
        shapes = {name: tensor.shape for name, tensor in other.state_dict().items()}
        state = resized_state(
            self.state_dict(), shapes, self.image_size // patch, image_size // patch, "open_clip's tower"
        )
        other.load_state_dict(state)
        other.pretrained_projection = self.pretrained_projection
        return other

    def set_patch_dropout(self, rate: float) -> None:
        """Leave out a share of the patches, by open_clip's own means."""
        if rate == self.patch_dropout:
            return
        config = copy.deepcopy(self.settings)
        if isinstance(config["vision_cfg"].get("layers"), (list, tuple)):
            super().set_patch_dropout(rate)
        config["vision_cfg"]["patch_dropout"] = rate
        try:
            visual = _tower(config, self.image_size)
        except TypeError:
            super().set_patch_dropout(rate)
            return
        visual.load_state_dict(self.visual.state_dict())
        for own, other in zip(self.visual.parameters(), visual.parameters(), strict=True):
            other.requires_grad_(own.requires_grad)
        self.visual, self.patch_dropout = visual.train(self.training), rate

    def set_grad_checkpointing(self, enabled: bool = True) -> None:
        """Recompute each block in the backward, by open_clip's own means."""
        self.visual.set_grad_checkpointing(enabled)

    def _probe(self) -> int:
        def feature_of(visual: nn.Module) -> Tensor:
            device = next(visual.parameters()).device
            return visual(torch.zeros(1, 3, self.image_size, self.image_size, device=device))

        return freeze_unused(self.visual, lambda: _tower(self.settings, self.image_size), feature_of)


def build_open_clip(settings: VisionSettings) -> tuple[OpenClipVision, Preprocessing]:
    """The tower that the settings describe.

    `vision.path` is a directory with open_clip_config.json and weights, or a file of weights for `vision.name`; of a
    whole model the image side is taken. Nothing is downloaded.

    Raises:
        ModelError: open_clip is missing, does not know the name, or the weights do not fit.
    """
    open_clip = require_open_clip()
    folder = Path(settings.path) if settings.path else None
    preprocess: dict[str, Any] = {}
    if folder is not None and folder.is_dir():
        content = read_json(folder / CONFIG, ModelError)
        if not isinstance(content, dict) or "model_cfg" not in content:
            raise ModelError(f"{folder / CONFIG} is not open_clip's (no model_cfg)")
        model_cfg, preprocess = content["model_cfg"], content.get("preprocess_cfg") or {}
    else:
        model_cfg = open_clip.get_model_config(settings.name) if settings.name else None
        if model_cfg is None:
            raise ModelError(
                f"open_clip knows no model {settings.name!r}; set vision.name (open_clip.list_models())"
            )
    config = {
        "embed_dim": model_cfg["embed_dim"],
        "vision_cfg": {**model_cfg["vision_cfg"], "timm_model_pretrained": False},
        "quick_gelu": bool(model_cfg.get("quick_gelu", False)),
    }
    native = config["vision_cfg"].get("image_size", 224)
    trunk = OpenClipVision(config, int(native[0] if isinstance(native, (list, tuple)) else native))
    if settings.pretrained:
        if folder is None:
            raise ModelError(no_weights("open_clip"))
        _load(trunk, folder / WEIGHTS if (folder / WEIGHTS).is_file() else folder)
    trunk = trunk.resized(settings.image_size or trunk.image_size)
    return trunk, from_preprocess(preprocess, trunk.image_size)


def _tower(config: dict[str, Any], image_size: int) -> Any:
    """The image side of an open_clip model without its projection."""
    open_clip = require_open_clip()
    values = {**config["vision_cfg"], "image_size": image_size}
    model = open_clip.model.CustomTextCLIP(
        config["embed_dim"], values, dict(_NO_TEXT), quick_gelu=config["quick_gelu"]
    )
    visual = model.visual
    if isinstance(getattr(visual, "proj", None), Tensor):
        visual.proj = None
    if hasattr(visual, "trunk") and hasattr(getattr(visual, "head", None), "proj"):
        visual.head = nn.Identity()
    return visual


def _load(trunk: OpenClipVision, path: Path) -> None:
    start = "visual."
    tensors = {n[len(start) :]: t.float() for n, t in read_tensors(path).items() if n.startswith(start)}
    if not tensors:
        raise ModelError(f"{path} has no image side (names that begin with {start})")
    projection = tensors.pop("proj", None)
    weight, bias = tensors.pop("head.proj.weight", None), tensors.pop("head.proj.bias", None)
    check_names(trunk.visual.state_dict(), tensors, str(path))
    trunk.visual.load_state_dict(tensors)
    if projection is not None:
        trunk.pretrained_projection = projection.t().clone(), None
    elif weight is not None:
        trunk.pretrained_projection = weight, bias
