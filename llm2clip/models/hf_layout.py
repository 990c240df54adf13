"""Hugging Face's layout of LLM2CLIP: `vision_model.*`, `visual_projection`, `text_adapter.adaptor.*`, `logit_scale`.

It is the layout of the published checkpoints, so that whatever reads those reads these too, and transformers itself
loads the image side (`CLIPVisionModelWithProjection`). Their config.json has no place for what our models know besides;
that stands under `llm2clip`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from llm2clip.errors import ModelError
from llm2clip.files import write_json
from llm2clip.models.eva02 import EVA02, EVA02Config
from llm2clip.models.hf_files import published_names
from llm2clip.models.hf_vision import HFVision, config_to_dict
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.models.model_card import ModelCard
from llm2clip.models.model_files import (
    describe,
    load_parts,
    model_of,
    other_tensors,
    plain_trunk,
    write_companions,
    write_tensors,
)
from llm2clip.models.published_names import VISION, eva_to_transformers, from_hugging_face
from llm2clip.models.weights import SAFETENSORS, read_tensors

_WHOLE = {"clip_vision_model": "clip", "siglip_vision_model": "siglip", "siglip2_vision_model": "siglip2"}
# CLIP's own text tower has the names that transformers gives it
_OURS, _THEIRS = "clip_text.model.", "text_model."


def fill_hugging_face(model: LLM2CLIP, folder: Path, card: ModelCard | None = None) -> None:
    """Write a model in the layout of the published checkpoints into an empty directory.

    Raises:
        ModelError: the tower is none that the layout has names for.
    """
    trunk = plain_trunk(model.vision_model)
    if isinstance(trunk, EVA02):
        model_type, vision = "evaclip", _eva_config(trunk.sizes)
        inside = {f"vision_model.{name}": t for name, t in eva_to_transformers(trunk.state_dict()).items()}
    elif isinstance(trunk, HFVision) and trunk.model.config.model_type in _WHOLE:
        model_type, vision = _WHOLE[trunk.model.config.model_type], config_to_dict(trunk.model.config)
        if model_type == "clip":  # where CLIPVisionModelWithProjection looks for it
            vision["projection_dim"] = model.settings.embed_dim
        inside = published_names(trunk.model)
    else:
        raise ModelError(
            f"Hugging Face's layout has no names for this {trunk.kind} tower; it holds CLIP's, SigLIP's and EVA02's. "
            "Use layout=native, which holds every tower"
        )
    config: dict[str, Any] = {
        "model_type": model_type,
        "projection_dim": model.settings.embed_dim,
        "vision_config": vision,
    }
    if model.clip_text is not None:
        config["text_config"] = model.clip_text.to_config()
    config["llm2clip"] = describe(model)
    rest = _renamed(other_tensors(model), _OURS, _THEIRS)
    write_tensors({**inside, **rest}, folder / SAFETENSORS)
    write_json(folder / "config.json", config)
    write_companions(model, folder, card)


def read_hugging_face(place: Path, config: dict[str, Any]) -> LLM2CLIP:
    """Read what `fill_hugging_face` wrote.

    Raises:
        ModelError: config.json is damaged, or weights are missing, unexpected or of another shape.
    """
    model = model_of(config["llm2clip"], place)
    eva = isinstance(model.vision_model.model, EVA02)
    named = from_hugging_face(read_tensors(place), eva)
    prefix = "" if eva else "model."
    inside = {prefix + name[len(VISION) :]: t for name, t in named.items() if name.startswith(VISION)}
    rest = {name: tensor for name, tensor in named.items() if not name.startswith(VISION)}
    load_parts(model, inside, _renamed(rest, _THEIRS, _OURS), str(place))
    return model


def _renamed(tensors: Mapping[str, Tensor], old: str, new: str) -> dict[str, Tensor]:
    return {new + n[len(old) :] if n.startswith(old) else n: tensor for n, tensor in tensors.items()}


def _eva_config(sizes: EVA02Config) -> dict[str, Any]:
    return {
        "model_type": "evaclip_vision_model",
        "image_size": sizes.image_size,
        "patch_size": sizes.patch_size,
        "hidden_size": sizes.width,
        "intermediate_size": sizes.hidden,
        "num_hidden_layers": sizes.depth,
        "num_attention_heads": sizes.heads,
        "layer_norm_eps": sizes.eps,
        "q_bias": True,
        "k_bias": False,
        "v_bias": True,
        "use_rope": True,
        "use_swiglu_mlp": True,
        "use_sub_ln": True,
        "pretrained_seq_len": 16,
    }
