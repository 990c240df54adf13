"""LLM2CLIP models in files: our own directory format, and the way to every other one."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from llm2clip.errors import ModelError
from llm2clip.files import atomic_path, read_json, write_json, write_text
from llm2clip.models.clip_text import TOKENIZER, clip_text_from_config
from llm2clip.models.llm2clip import LLM2CLIP, settings_fields
from llm2clip.models.model_card import ModelCard
from llm2clip.models.preprocessing import PREPROCESSOR
from llm2clip.models.trunk import VisionTrunk
from llm2clip.models.vision import VisionTower, set_up_training, tower_from_config
from llm2clip.models.vision_lora import has_lora, merged
from llm2clip.models.weights import SAFETENSORS, check_names, read_tensors, skip_random_init
from llm2clip.settings import ClipTextSettings, ModelSettings

if TYPE_CHECKING:
    from llm2clip.models.published import CheckpointOptions

log = logging.getLogger(__name__)

FORMAT = 1
OPEN_CLIP_CONFIG = "open_clip_config.json"
RESULT = "result"
"""Directory of the model inside a run's."""
LLM_ADAPTER = "llm_adapter"
"""Directory of the LLM's adapter beside a model that was trained together with it."""
_TRUNK = "vision_model.model."
# models saved before there was a choice do not say these
_LATER = {"projection": "linear", "adapter_normalize": True, "logit_bias_init": None}


def write_model(model: LLM2CLIP, path: str | os.PathLike[str], card: ModelCard | None = None) -> None:
    """Write a model in our own format, atomically; see `LLM2CLIP.save_pretrained`."""
    with atomic_path(path) as folder:
        folder.mkdir()
        fill_native(model, folder, card)


def fill_native(model: LLM2CLIP, folder: Path, card: ModelCard | None = None) -> None:
    """Write a model in our own format into an empty directory."""
    inside = {_TRUNK + name: t for name, t in plain_trunk(model.vision_model).native_state().items()}
    write_tensors({**inside, **other_tensors(model)}, folder / SAFETENSORS)
    write_json(folder / "config.json", {"model_type": "llm2clip", "format": FORMAT, **describe(model)})
    write_companions(model, folder, card)


def write_companions(model: LLM2CLIP, folder: Path, card: ModelCard | None) -> None:
    """Write what stands beside weights in every layout: image processor, tokenizer, LLM adapter, model card."""
    write_json(folder / PREPROCESSOR, model.vision_model.preprocessing.to_preprocessor())
    if model.clip_text is not None and model.clip_text.tokenizer is not None:
        model.clip_text.tokenizer.save_pretrained(folder / TOKENIZER)
    if model.caption_encoder is not None and model.llm_trained:
        model.caption_encoder.save_adapter(folder / LLM_ADAPTER)
    write_text(folder / "README.md", (card or ModelCard()).render(model))


def write_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write a safetensors file; tensors that share memory are written apart."""
    from safetensors.torch import save_file

    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    save_file(plain, file, metadata={"format": "pt"})


def plain_trunk(vision: VisionTower) -> VisionTrunk:
    """The network of a tower, with its adapters merged in where it has any."""
    return merged(vision.model) if has_lora(vision.model) else vision.model


def other_tensors(model: LLM2CLIP) -> dict[str, Tensor]:
    """All weights but those of the tower and of the LLM."""
    return {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not name.startswith(("vision_model.", "caption_encoder."))
    }


def describe(model: LLM2CLIP) -> dict[str, Any]:
    """A configuration that `model_of` reads; the fingerprint is that of the encoder as it is now."""
    values: dict[str, Any] = {
        "llm_dim": model.llm_dim,
        **{name: getattr(model.settings, name) for name in settings_fields()},
    }
    if model.clip_text is not None:
        values["clip_text"] = {"use": model.settings.clip_text.use, "config": model.clip_text.to_config()}
    encoder = model.caption_encoder if model.llm_trained else None
    values["vision"] = model.vision_model.to_config()
    values["text_encoder"] = model.fingerprint if encoder is None else encoder.fingerprint()
    return values


def read_model(
    path: str | os.PathLike[str],
    *,
    allow_missing: Sequence[str] = (),
    allow_unexpected: Sequence[str] = (),
    options: CheckpointOptions | None = None,
) -> LLM2CLIP:
    """Read a model of any layout; see `LLM2CLIP.from_pretrained`."""
    place = Path(path)
    if not (place / "config.json").is_file() and (place / RESULT / "config.json").is_file():
        place = place / RESULT
    if (place / OPEN_CLIP_CONFIG).is_file():
        from llm2clip.models.open_clip_layout import read_open_clip

        return read_open_clip(place)
    if not place.is_file() and not (place / "config.json").is_file():
        raise ModelError(
            f"{place} is not an LLM2CLIP model directory: it has no config.json. Expected a directory that "
            "save_pretrained wrote, a published checkpoint, or a file of weights (.pt, .safetensors)"
        )
    config = None if place.is_file() else read_json(place / "config.json", ModelError)
    if isinstance(config, dict) and config.get("model_type") == "llm2clip":
        return _read_own(place, config)
    if isinstance(config, dict) and "llm2clip" in config:
        from llm2clip.models.hf_layout import read_hugging_face

        return read_hugging_face(place, config)
    from llm2clip.models.published import read_published

    return read_published(
        place, config, allow_missing=allow_missing, allow_unexpected=allow_unexpected, options=options
    )


def _read_own(place: Path, config: dict[str, Any]) -> LLM2CLIP:
    if config.get("format") != FORMAT:
        raise ModelError(
            f"{place} has format {config.get('format')!r}, this version reads {FORMAT}; upgrade llm2clip"
        )
    model = model_of(config, place)
    file = place / SAFETENSORS
    tensors = read_tensors(file)
    inside = {name[len(_TRUNK) :]: tensor for name, tensor in tensors.items() if name.startswith(_TRUNK)}
    rest = {name: tensor for name, tensor in tensors.items() if not name.startswith(_TRUNK)}
    load_parts(model, inside, rest, str(file))
    return model


def model_of(config: Mapping[str, Any], place: Path) -> LLM2CLIP:
    """The model that `describe` described, without values: its weights are to be loaded with `load_parts`.

    Args:
        config: the description.
        place: directory of the model, for its tokenizer and for errors.

    Raises:
        ModelError: something is missing in it or of the wrong kind.
    """
    try:
        with skip_random_init():
            return _built(config, place)
    except (KeyError, TypeError) as error:
        raise ModelError(f"{place}/config.json is damaged: {type(error).__name__} {error}") from error


def _built(config: Mapping[str, Any], place: Path) -> LLM2CLIP:
    settings = ModelSettings(
        **{
            name: config.get(name, _LATER[name]) if name in _LATER else config[name]
            for name in settings_fields()
        }
    )
    clip_text = None
    if "clip_text" in config:
        use = ClipTextSettings(use=config["clip_text"]["use"], path=str(place))
        settings = dataclasses.replace(settings, clip_text=use)
        clip_text = clip_text_from_config(config["clip_text"]["config"], place / TOKENIZER)
    tower = tower_from_config(config["vision"])
    return LLM2CLIP(
        settings, int(config["llm_dim"]), config["text_encoder"], vision=tower, clip_text=clip_text
    )


def load_parts(model: LLM2CLIP, trunk: Mapping[str, Tensor], rest: Mapping[str, Tensor], source: str) -> None:
    """Load weights strictly: the tower's network under the names of files, everything else under the model's.

    Raises:
        ModelError: names or shapes differ.
    """
    # the parts outside the tower first: they are what people change
    check_names(other_tensors(model), rest, source)
    model.vision_model.model.load_native_state(dict(trunk), source)
    model.load_state_dict(dict(rest), strict=False)


def continue_from(
    model: LLM2CLIP, settings: ModelSettings, llm_dim: int, fingerprint: dict[str, Any] | None
) -> LLM2CLIP:
    """A loaded model, made ready to be trained on as the settings say; nothing of its weights is dropped.

    Raises:
        ModelError: it takes LLM embeddings of another width, or its tower cannot do what the settings ask for.
    """
    if model.llm_dim != llm_dim:
        raise ModelError(
            f"model.init {settings.init} takes LLM embeddings of width {model.llm_dim}, these have {llm_dim}; use the "
            "LLM that it was trained with"
        )
    if model.fingerprint is not None and fingerprint is not None and model.fingerprint != fingerprint:
        log.warning(
            "model.init %s was trained with embeddings of another encoder; its adapter has to learn these anew",
            settings.init,
        )
    vision, old = settings.vision, model.vision_model
    size = vision.image_size or old.image_size
    old.model.unfreeze()
    tower = VisionTower(old.model.resized(size), old.preprocessing.at_size(size).chosen(vision))
    set_up_training(tower, vision)
    changed = {name: getattr(model.settings, name) for name in settings_fields()}
    changed.update(
        {name: getattr(settings, name) for name in ("adapter_dropout", "adapter_noise", "logit_scale_max")}
    )
    fresh = [name for name in ("logit_scale", "logit_bias") if getattr(settings, f"{name}_init") is not None]
    changed.update({f"{name}_init": getattr(settings, f"{name}_init") for name in fresh})
    changed["clip_text"] = settings.clip_text if model.clip_text is None else model.settings.clip_text
    result = LLM2CLIP(
        dataclasses.replace(settings, **changed),
        llm_dim,
        fingerprint or model.fingerprint,
        vision=tower,
        clip_text=model.clip_text,
    )
    weights = {name: tensor for name, tensor in other_tensors(model).items() if name not in fresh}
    result.load_state_dict(weights, strict=False)
    return result
