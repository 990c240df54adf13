"""Reading transformers vision models: directories, configurations, names that outlive transformers' versions."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llm2clip.errors import ModelError
from llm2clip.files import read_json
from llm2clip.models.hf_vision import HFVision
from llm2clip.models.positions import resized_state
from llm2clip.models.preprocessing import Preprocessing, read_preprocessor
from llm2clip.models.weights import (
    check_names,
    one_tensor,
    require_plausible,
    skip_random_init,
    weight_files,
)
from llm2clip.settings import VisionPooling, VisionSettings

_POOLERS = ("pooler.", "head.")
_CLASSES = {
    "clip_vision_model": "CLIPVisionModel",
    "siglip_vision_model": "SiglipVisionModel",
    "siglip2_vision_model": "Siglip2VisionModel",
}
# published files of these put the vision half of a whole model under this name
_HALF = "vision_model."


def load_hf_vision(
    path: str | os.PathLike[str],
    image_size: int | None = None,
    *,
    pooling: VisionPooling = "auto",
    pretrained: bool = True,
) -> HFVision:
    """Load a vision model from a directory (weights) or a config.json (random weights).

    A directory of a whole CLIP or SigLIP model gives its vision half.

    Args:
        path: the directory or file.
        image_size: side of the square input; None: the configuration's. Learned position embeddings are
            interpolated to it, for good.
        pooling: see `HFVision`.
        pretrained: False takes the configuration alone.

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
    config = vision_config(values)
    size = image_size or _native_size(config, file)
    if not place.is_dir() or not pretrained:
        if hasattr(config, "image_size"):
            _require_whole_patches(config, size)
            config.image_size = size
        return HFVision(vision_class(config)(config), size, pooling)
    require_plausible(config, weight_files(place), os.fspath(place))
    try:
        model, report = vision_class(config).from_pretrained(
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
    trunk = HFVision(at_size(model, size), size, "cls" if poolerless and pooling == "auto" else pooling)
    if trunk.pooling == "pooler" and (weight := one_tensor(place, "visual_projection.weight")) is not None:
        trunk.pretrained_projection = weight, one_tensor(place, "visual_projection.bias")
    return trunk


def build_hf_vision(settings: VisionSettings) -> tuple[HFVision, Preprocessing]:
    """The tower that the settings describe, and what its preprocessor_config.json says of images.

    Raises:
        ModelError: no path is given, or what is there cannot be used.
    """
    if not settings.path:
        raise ModelError(
            "vision.kind transformers needs vision.path: a model directory (weights) or a config.json"
        )
    trunk = load_hf_vision(
        settings.path, settings.image_size, pooling=settings.pooling, pretrained=settings.pretrained
    )
    size = trunk.image_size
    return trunk, read_preprocessor(settings.path, size).at_size(size)


def at_size(model: Any, image_size: int) -> Any:
    """The model with its learned position embeddings interpolated to another image size.

    Raises:
        ModelError: the size is no multiple of the patch size, or the family cannot change it.
    """
    own = _square(getattr(model.config, "image_size", None))
    patch = _square(getattr(model.config, "patch_size", None))
    if own is None or patch is None or own == image_size:
        return model
    _require_whole_patches(model.config, image_size)
    config = copy.deepcopy(model.config)
    config.image_size = image_size
    name = type(model).__name__
    with torch.device("meta"):
        shapes = {key: tensor.shape for key, tensor in type(model)(config).state_dict().items()}
    state = resized_state(model.state_dict(), shapes, own // patch, image_size // patch, name)
    with skip_random_init():
        resized = type(model)(config).to(next(model.parameters()).dtype)
    resized.load_state_dict(state)
    return resized.eval()


def _require_whole_patches(config: Any, image_size: int) -> None:
    """Raise ModelError for a size, other than the configuration's own, whose last pixels no patch would see."""
    own, patch = _square(getattr(config, "image_size", None)), _square(getattr(config, "patch_size", None))
    if patch and image_size != own and image_size % patch:
        raise ModelError(f"image size {image_size} is not a multiple of the patch size {patch}")


def vision_from_dict(values: dict[str, Any], image_size: int, *, pooling: VisionPooling = "auto") -> HFVision:
    """A vision model with random weights from the content of its config.json, which is not changed."""
    config = vision_config(values)
    return HFVision(vision_class(config)(config), image_size, pooling)


def vision_config(values: Mapping[str, Any]) -> Any:
    """The configuration object of a vision model; of a whole image-text model its vision half's.

    Raises:
        ModelError: transformers does not know the type, or values are of the wrong kind.
    """
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


def vision_class(config: Any) -> Any:
    """The transformers class for a vision configuration.

    Raises:
        ModelError: there is none.
    """
    import transformers

    if config.model_type in _CLASSES:
        return getattr(transformers, _CLASSES[config.model_type])
    try:
        found = transformers.MODEL_MAPPING[type(config)]
    except KeyError:
        raise ModelError(f"transformers has no vision model of type {config.model_type!r}") from None
    return found[0] if isinstance(found, (tuple, list)) else found


def published_names(model: Any) -> dict[str, Tensor]:
    """Weights of a transformers model under the names of files on the hub.

    transformers renames its modules between versions and translates when it loads and saves; what it calls a weight
    inside is therefore no name for a file.
    """
    from transformers.core_model_loading import revert_weight_conversion

    state: dict[str, Tensor] = revert_weight_conversion(model, model.state_dict())
    if model.config.model_type in _CLASSES:
        state = {name if name.startswith(_HALF) else _HALF + name: tensor for name, tensor in state.items()}
    return state


def load_named(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load weights under their names on the hub, or those of the installed transformers, in place.

    Raises:
        ModelError: weights are missing, unexpected or of another shape.
    """
    own = model.state_dict()
    bare = {name.removeprefix(_HALF): tensor for name, tensor in state.items()}
    half = {_HALF + name: tensor for name, tensor in bare.items()}
    # CLIP and SigLIP halves: whether the prefix is part of the name depends on the version
    state = max((state, bare, half), key=lambda names: len(own.keys() & names.keys()))
    if own.keys() != state.keys():
        state = _converted(model, state) or state
    check_names(own, state, source)
    model.load_state_dict(dict(state))


def _converted(model: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """The weights under the names that the installed transformers gives them; None where it cannot place them all."""
    try:
        loaded, report = type(model).from_pretrained(
            None, config=model.config, state_dict=dict(state), output_loading_info=True, dtype=torch.float32
        )
    except Exception:  # a dozen unrelated types; the comparison of names that follows says what is wrong
        return None
    if report["missing_keys"] or report["unexpected_keys"]:
        return None
    result: dict[str, Tensor] = loaded.state_dict()
    return result


def _native_size(config: Any, file: Path) -> int:
    size = _square(getattr(config, "image_size", None))
    if size is None and hasattr(config, "num_patches"):  # SigLIP 2 counts the patches of its square grid
        size = round(config.num_patches**0.5) * int(config.patch_size)
    if size is None:
        raise ModelError(f"{file} does not say the image size; set vision.image_size")
    return size


def _square(value: Any) -> int | None:
    if isinstance(value, (list, tuple)):
        return int(value[0]) if len(set(value)) == 1 else None
    return None if value is None else int(value)
