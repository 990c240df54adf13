"""Vision towers of timm, where it is installed: any of its models, from random weights or its files."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from llm2clip.errors import ModelError
from llm2clip.files import read_json
from llm2clip.models.layers import LayerGroup
from llm2clip.models.preprocessing import Preprocessing, triple
from llm2clip.models.trunk import VisionTrunk, freeze_unused, no_weights
from llm2clip.models.weights import check_names, read_tensors
from llm2clip.settings import Fit, Interpolation, VisionSettings

_FITS: dict[str, Fit] = {"center": "crop", "squash": "squash", "border": "pad"}


def require_timm() -> Any:
    """The timm package.

    Raises:
        ModelError: it is not installed.
    """
    try:
        import timm
    except ImportError as error:
        raise ModelError("this vision tower needs timm: pip install timm") from error
    return timm


class TimmVision(VisionTrunk):
    """Pooled feature of a timm model.

    Args:
        name: timm's name of the architecture.
        image_size: side of the square input.
        options: further arguments of `timm.create_model`.
    """

    kind = "timm"

    def __init__(self, name: str, image_size: int, options: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.name, self.image_size, self.options = name, image_size, dict(options or {})
        self.network = _create(name, image_size, self.options)
        self.dim = self._probe()

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Normalised pixels (B, 3, S, S) -> (B, dim)."""
        return self.network(pixel_values)

    def config(self) -> dict[str, Any]:
        """Name and options of the architecture."""
        return {"name": self.name, "options": self.options}

    def layer_groups(self) -> list[LayerGroup]:
        """timm's own grouping."""
        return timm_groups(self.network, "network.")

    def unfreeze(self) -> None:
        """Train every parameter that the feature depends on."""
        self.requires_grad_(True)
        self._probe()

    def resized(self, image_size: int) -> TimmVision:
        """The network for images of another size, by timm's own interpolation."""
        set_input_size(self.network, image_size, self.name)
        self.image_size = image_size
        return self

    def set_patch_dropout(self, rate: float) -> None:
        """Leave out a share of the patches, by timm's own means."""
        if rate == self.patch_dropout:
            return
        try:
            network = _create(self.name, self.image_size, {**self.options, "patch_drop_rate": rate})
        except TypeError:
            super().set_patch_dropout(rate)
            return
        network.load_state_dict(self.network.state_dict())
        for own, other in zip(self.network.parameters(), network.parameters(), strict=True):
            other.requires_grad_(own.requires_grad)
        self.network, self.patch_dropout = network.train(self.training), rate

    def set_grad_checkpointing(self, enabled: bool = True) -> None:
        """Recompute each block in the backward, by timm's own means."""
        try:
            self.network.set_grad_checkpointing(enabled)
        except (AttributeError, AssertionError) as error:
            raise ModelError(f"vision.grad_checkpointing: {self.name} does not support it") from error

    def _probe(self) -> int:
        def feature_of(network: nn.Module) -> Tensor:
            device = next(network.parameters()).device
            try:
                feature = network(torch.zeros(1, 3, self.image_size, self.image_size, device=device))
            except (RuntimeError, AssertionError, ValueError) as error:
                raise ModelError(
                    f"{self.name} cannot take images of {self.image_size} pixels: {error}"
                ) from error
            if feature.ndim != 2:
                raise ModelError(f"{self.name} gives {tuple(feature.shape)}, expected one feature per image")
            return feature

        return freeze_unused(
            self.network, lambda: _create(self.name, self.image_size, self.options), feature_of
        )


def build_timm(settings: VisionSettings) -> tuple[TimmVision, Preprocessing]:
    """The tower that the settings describe.

    `vision.path` is a directory that timm wrote (config.json with `architecture`, and weights), or a file of weights
    for `vision.name`; nothing is downloaded.

    Raises:
        ModelError: timm is missing, does not know the name, or the weights do not fit.
    """
    timm = require_timm()
    name, options, values = settings.name, {}, {}
    if settings.path and Path(settings.path).is_dir():
        config = read_json(Path(settings.path) / "config.json", ModelError)
        if not isinstance(config, dict) or "architecture" not in config:
            raise ModelError(f"{settings.path}/config.json is not timm's (no architecture)")
        name = str(config["architecture"])
        options, values = dict(config.get("model_args") or {}), dict(config.get("pretrained_cfg") or {})
    if not name or not timm.is_model(name):
        raise ModelError(
            f"timm {timm.__version__} knows no architecture {name!r}; set vision.name (timm.list_models())"
        )
    options = {key: value for key, value in options.items() if key not in ("img_size", "num_classes")}
    values = {**timm.get_pretrained_cfg(name).to_dict(), **values}
    native = int(values["input_size"][-1])
    trunk = TimmVision(name, native, options)
    if settings.pretrained:
        if not settings.path:
            raise ModelError(no_weights("timm"))
        _load(trunk, settings.path, values.get("classifier"))
    trunk = trunk.resized(settings.image_size or native)
    return trunk, _preprocessing(values, native).at_size(trunk.image_size)


def timm_groups(network: nn.Module, prefix: str) -> list[LayerGroup]:
    """Parameters of a timm model in order of depth, their names behind `prefix`."""
    from timm.models import group_parameters

    groups: dict[int, list[str]] = group_parameters(network, network.group_matcher())  # type: ignore[operator]
    ordered = [groups[number] for number in sorted(groups)]
    titles = ["embeddings", *(f"layer.{index}" for index in range(len(ordered) - 1))]
    return [
        LayerGroup(title, tuple(prefix + name for name in names))
        for title, names in zip(titles, ordered, strict=True)
    ]


def set_input_size(network: Any, image_size: int, name: str) -> None:
    """Let a timm model take images of another size.

    Raises:
        ModelError: it has learned positions and cannot change them.
    """
    if hasattr(network, "set_input_size"):
        try:
            network.set_input_size(image_size)
        except (AssertionError, ValueError, TypeError) as error:
            raise ModelError(f"{name} cannot take images of {image_size} pixels: {error}") from error


def _create(name: str, image_size: int, options: dict[str, Any]) -> Any:
    timm = require_timm()
    try:
        return timm.create_model(name, pretrained=False, num_classes=0, img_size=image_size, **options)
    except TypeError:  # convolutional networks take any size and have no such argument
        return timm.create_model(name, pretrained=False, num_classes=0, **options)


def _load(trunk: TimmVision, path: str, classifier: Any) -> None:
    tensors = read_tensors(path)
    # the classifier is no part of a tower, and has the classes of another task
    heads = tuple(f"{head}." for head in ([classifier] if isinstance(classifier, str) else classifier or []))
    own = trunk.network.state_dict()
    tensors = {n: t.float() for n, t in tensors.items() if n in own or not n.startswith(heads)}
    check_names(own, tensors, path)
    trunk.network.load_state_dict(tensors)


def _preprocessing(values: dict[str, Any], size: int) -> Preprocessing:
    share = float(values.get("crop_pct") or 1.0)
    fit = _FITS.get(str(values.get("crop_mode") or "center"), "crop")
    interpolation = str(values.get("interpolation") or "bicubic")
    return Preprocessing(
        size,
        triple(values["mean"]),
        triple(values["std"]),
        fit,
        interpolation if interpolation in get_args(Interpolation) else "bicubic",  # type: ignore[arg-type]
        int(size / share) if fit == "crop" and share < 1.0 else 0,
    )
