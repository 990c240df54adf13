"""Published LLM2CLIP checkpoints without their remote code: weights are matched by name, checked by shape, all used.

The forward of these checkpoints is that of our own modules, so nothing of theirs has to run. What a file holds and the
model has no place for is an error, and so is what the model needs and the file does not hold, unless it is allowed by
name.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from llm2clip.errors import ModelError
from llm2clip.models.eva02_files import eva02_at_size, read_eva02
from llm2clip.models.hf_files import load_named, vision_class, vision_config
from llm2clip.models.hf_vision import HFVision
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.models.preprocessing import PREPROCESSOR, Preprocessing, read_preprocessor
from llm2clip.models.published_names import VISION, Family, from_hugging_face, from_repository
from llm2clip.models.trunk import VisionTrunk
from llm2clip.models.vision import VisionTower
from llm2clip.models.weights import listing, not_allowed, other_shapes, read_tensors, skip_random_init
from llm2clip.settings import ModelSettings

log = logging.getLogger(__name__)

# heads of timm's SigLIP towers by width; the weights do not say them
_SIGLIP_HEADS = {768: 12, 1024: 16, 1152: 16, 1536: 16}
_EVA_TYPES = ("evaclip", "eva_clip", "clip_eva")
_ADAPTER = "text_adapter.adaptor."


@dataclass(frozen=True)
class CheckpointOptions:
    """What a checkpoint's weights do not say; None: what the published ones have.

    Attributes:
        heads: attention heads of the tower.
        activation: transformers' name of the tower's activation; OpenAI's towers have `quick_gelu`, timm's SigLIP
            towers the exact `gelu`.
        normalize: whether LLM embeddings are scaled to unit length before the adapter.
        llm_dim: width of the LLM embeddings, for a checkpoint without adapter.
    """

    heads: int | None = None
    activation: str | None = None
    normalize: bool | None = None
    llm_dim: int | None = None


def read_published(
    path: Path,
    config: Any,
    *,
    allow_missing: Sequence[str] = (),
    allow_unexpected: Sequence[str] = (),
    options: CheckpointOptions | None = None,
) -> LLM2CLIP:
    """Read a checkpoint in Hugging Face's layout (a directory) or the repository's (a file).

    Args:
        path: directory with config.json and weights, or a file of weights.
        config: content of the directory's config.json; None for a file.
        allow_missing: patterns of our names that may be missing and keep their initial values.
        allow_unexpected: patterns of names in the file that are left out.
        options: what neither weights nor config.json say.

    Raises:
        ModelError: the layout is not known, or weights are missing, unexpected or of another shape.
    """
    if config is not None and not (
        isinstance(config, dict) and isinstance(config.get("vision_config"), dict)
    ):
        found = config.get("model_type") if isinstance(config, dict) else type(config).__name__
        raise ModelError(
            f"{path}/config.json is neither of model_type llm2clip nor of a published checkpoint (no vision_config), "
            f"but {found!r}"
        )
    tensors = read_tensors(path)
    return assemble(
        tensors,
        config,
        str(path),
        preprocessing=_preprocessing(path, config),
        allow_missing=allow_missing,
        allow_unexpected=allow_unexpected,
        options=options,
    )


def assemble(
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any] | None,
    source: str,
    *,
    preprocessing: Preprocessing | None = None,
    allow_missing: Sequence[str] = (),
    allow_unexpected: Sequence[str] = (),
    options: CheckpointOptions | None = None,
) -> LLM2CLIP:
    """A model of published weights by name; the arguments are those of `read_published`."""
    options = options or CheckpointOptions()
    unwanted = set(tensors) - set(not_allowed(list(tensors), allow_unexpected))
    if unwanted:
        log.warning("%s: left out as allowed: %s", source, ", ".join(sorted(unwanted)))
    kept = {name: tensor for name, tensor in tensors.items() if name not in unwanted}
    eva = config is not None and config.get("model_type") in _EVA_TYPES
    if config is None:
        named, family = from_repository(kept)
    else:
        named = from_hugging_face(kept, eva)
        family = "eva02" if eva else "transformers"
    vision = {name[len(VISION) :]: tensor for name, tensor in named.items() if name.startswith(VISION)}
    if not vision:
        raise ModelError(
            f"{source} holds no vision tower: expected names that begin with visual. or vision_model., got "
            f"{', '.join(sorted(tensors)[:10])}"
        )
    rest = {name: tensor.float() for name, tensor in named.items() if not name.startswith(VISION)}
    online = any(name.startswith("text.text_proj.") for name in tensors)
    # what may be missing needs its initial values
    with nullcontext() if allow_missing else skip_random_init():
        trunk = _tower(vision, config, family, source, options)
        settings, llm_dim = _settings(rest, trunk, source, options, online)
        size = trunk.image_size
        prepared = (preprocessing or Preprocessing(size, fit="crop", interpolation="bicubic")).at_size(size)
        model = LLM2CLIP(settings, llm_dim, vision=VisionTower(trunk, prepared))
    own = {
        name: tensor for name, tensor in model.state_dict().items() if not name.startswith("vision_model.")
    }
    problems = listing(
        missing=not_allowed(sorted(own.keys() - rest.keys()), allow_missing),
        unexpected=sorted(rest.keys() - own.keys()),
        shapes=other_shapes(own, rest),
    )
    if problems:
        raise ModelError(
            f"{source} does not fit an LLM2CLIP model: {problems}. Nothing of a checkpoint is dropped or made up; "
            "what may be is named with allow_unexpected and allow_missing"
        )
    model.load_state_dict({name: tensor for name, tensor in rest.items() if name in own}, strict=False)
    return model


def _tower(
    vision: Mapping[str, Tensor],
    config: Mapping[str, Any] | None,
    family: Family,
    source: str,
    options: CheckpointOptions,
) -> VisionTrunk:
    if family == "eva02":
        heads, eps = options.heads, None
        if config is not None:
            heads = heads or config["vision_config"].get("num_attention_heads")
            eps = config["vision_config"].get("layer_norm_eps")
        weights, sizes = read_eva02(vision, source, heads, eps)
        return eva02_at_size(weights, sizes)
    values = (
        config["vision_config"] if config is not None else _vision_values(vision, family, source, options)
    )
    if config is not None:
        # the vision half of a whole model's configuration need not name its own type
        values = {"model_type": f"{config.get('model_type')}_vision_model", **values}
    if options.activation:
        values = {**values, "hidden_act": options.activation}
    made = vision_config(values)
    model = vision_class(made)(made)
    load_named(model, {name: tensor.float() for name, tensor in vision.items()}, source)
    return HFVision(model, int(made.image_size))


def _vision_values(
    vision: Mapping[str, Tensor], family: Family, source: str, options: CheckpointOptions
) -> dict[str, Any]:
    """A transformers configuration for weights that came without one."""
    try:
        patches = vision["embeddings.patch_embedding.weight"]
        rows = len(vision["embeddings.position_embedding.weight"])
        hidden = len(vision["encoder.layers.0.mlp.fc1.weight"])
    except KeyError as error:
        raise ModelError(f"{source}: the vision tower has no {error.args[0]}") from None
    width, patch = patches.shape[0], patches.shape[-1]
    grid = int((rows - (family == "clip")) ** 0.5)
    heads = options.heads or (max(1, width // 64) if family == "clip" else _SIGLIP_HEADS.get(width))
    if heads is None:
        raise ModelError(
            f"{source}: the heads of a SigLIP tower of width {width} are not known; known widths are "
            f"{', '.join(map(str, _SIGLIP_HEADS))}. Give options=CheckpointOptions(heads=...)"
        )
    layers = {int(name.split(".")[2]) for name in vision if name.startswith("encoder.layers.")}
    return {
        "model_type": f"{family}_vision_model",
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_hidden_layers": 1 + max(layers),
        "num_attention_heads": heads,
        "patch_size": patch,
        "image_size": grid * patch,
        "hidden_act": "quick_gelu" if family == "clip" else "gelu",
    }


def _settings(
    rest: Mapping[str, Tensor], trunk: VisionTrunk, source: str, options: CheckpointOptions, online: bool
) -> tuple[ModelSettings, int]:
    """Sizes of everything but the tower, read off the weights."""
    parts = {name[len(_ADAPTER) :].split(".")[0] for name in rest if name.startswith(_ADAPTER)}
    numbers = sorted(int(part) for part in parts if part.isdigit())
    blocks = [n for n in numbers if f"{_ADAPTER}{n}.fn.0.weight" in rest]
    last = rest.get(f"{_ADAPTER}{numbers[-1]}.weight") if numbers else None
    projection = rest.get("visual_projection.weight")
    if last is not None and last.ndim == 2:
        embed_dim, llm_dim = last.shape
    elif options.llm_dim is not None:
        embed_dim, llm_dim = (len(projection) if projection is not None else trunk.dim), options.llm_dim
    else:
        raise ModelError(
            f"{source} has no text adapter (text_adapter.adaptor.*, text.text_adaptor.*), so it is half a model; to "
            "use its image side alone give options=CheckpointOptions(llm_dim=...) and allow_missing=('text_adapter.*',)"
        )
    first = rest.get(f"{_ADAPTER}0.fn.0.weight")
    normalize = options.normalize
    kind = "none" if projection is None else "affine" if "visual_projection.bias" in rest else "linear"
    bias = rest.get("logit_bias")
    return (
        ModelSettings(
            embed_dim=int(embed_dim),
            projection=kind,  # type: ignore[arg-type]
            adapter_depth=len(blocks),
            adapter_expansion=max(1, len(first) // int(llm_dim)) if first is not None else 2,
            # the repository's path with the LLM in the loop does not normalise, its path with stored embeddings does
            adapter_normalize=(not online) if normalize is None else normalize,
            logit_bias_init=0.0 if bias is not None else None,
        ),
        int(llm_dim),
    )


def _preprocessing(path: Path, config: Any) -> Preprocessing | None:
    folder = path if path.is_dir() else path.parent
    if not (folder / PREPROCESSOR).is_file():
        return None
    size = int(config["vision_config"].get("image_size", 224)) if config is not None else 224
    return read_preprocessor(folder, size)
