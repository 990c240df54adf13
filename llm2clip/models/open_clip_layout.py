"""open_clip's layout: `open_clip_model.safetensors` and `open_clip_config.json`, for whatever takes open_clip models.

open_clip loads the directory with `local-dir:` and has the image side; its text side is CLIP's own text tower where the
model has one, else a stand-in of a few numbers that gives zeros, because no open_clip model is without. LLM2CLIP's text
side, the adapter, stands in a file beside, and `LLM2CLIP.from_pretrained` reads the whole again.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm2clip.errors import ModelError
from llm2clip.files import read_json, write_json
from llm2clip.models.eva02 import EVA02
from llm2clip.models.hf_files import published_names
from llm2clip.models.hf_vision import HFVision
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
from llm2clip.models.open_clip_names import (
    CONFIG,
    WEIGHTS,
    clip_text_to_open_clip,
    clip_to_open_clip,
    eva02_from_timm,
    eva02_name,
    eva02_to_timm,
    siglip_name,
    siglip_to_timm,
    to_preprocess,
)
from llm2clip.models.open_clip_vision import OpenClipVision
from llm2clip.models.published_names import VISION, from_repository
from llm2clip.models.timm_vision import TimmVision
from llm2clip.models.trunk import VisionTrunk
from llm2clip.models.weights import read_tensors

ADAPTER_WEIGHTS = "text_adapter.safetensors"
_SCALARS = ("logit_scale", "logit_bias")
# the least that open_clip builds; its projection is zero
_STAND_IN = {"context_length": 77, "vocab_size": 49408, "width": 1, "heads": 1, "layers": 1}


def fill_open_clip(model: LLM2CLIP, folder: Path, card: ModelCard | None = None) -> None:
    """Write a model in open_clip's layout into an empty directory.

    Raises:
        ModelError: open_clip has no tower like the model's.
    """
    trunk = plain_trunk(model.vision_model)
    vision_cfg, quick_gelu, tensors = _image_side(trunk, model)
    text_cfg, text = _text_side(model, quick_gelu)
    rest = other_tensors(model)
    tensors.update({f"text.{name}": tensor for name, tensor in text.items()})
    tensors.update({name: rest[name] for name in _SCALARS if name in rest})
    model_cfg: dict[str, Any] = {
        "embed_dim": model.settings.embed_dim,
        "vision_cfg": {"image_size": model.vision_model.image_size, **vision_cfg},
        "text_cfg": text_cfg,
        "quick_gelu": quick_gelu,
        "custom_text": True,
    }
    if model.logit_bias is not None:
        model_cfg["init_logit_bias"] = float(model.logit_bias)
    config = {
        "model_cfg": model_cfg,
        "preprocess_cfg": to_preprocess(model.vision_model.preprocessing),
        "llm2clip": describe(model),
    }
    own = {name: tensor for name, tensor in rest.items() if name not in _SCALARS}
    write_tensors(tensors, folder / WEIGHTS)
    write_tensors(own, folder / ADAPTER_WEIGHTS)
    write_json(folder / CONFIG, config)
    write_companions(model, folder, card)


def read_open_clip(place: Path) -> LLM2CLIP:
    """Read what `fill_open_clip` wrote.

    Raises:
        ModelError: it is another open_clip model (which has no LLM adapter), or damaged.
    """
    config = read_json(place / CONFIG, ModelError)
    if not isinstance(config, dict) or not isinstance(config.get("llm2clip"), dict):
        raise ModelError(
            f"{place} is an open_clip model without LLM2CLIP's adapter; as a tower to train from it is "
            "vision.kind=open_clip vision.path=..."
        )
    model = model_of(config["llm2clip"], place)
    tensors = read_tensors(place / WEIGHTS)
    image = {name: tensor for name, tensor in tensors.items() if name.startswith("visual.")}
    rest = {name: tensor for name, tensor in tensors.items() if name in _SCALARS}
    rest.update(read_tensors(place / ADAPTER_WEIGHTS))
    # the projection is in both files, so that each is whole
    load_parts(model, _trunk_state(model.vision_model.model, image), rest, str(place))
    return model


def _image_side(trunk: VisionTrunk, model: LLM2CLIP) -> tuple[dict[str, Any], bool, dict[str, Tensor]]:
    """open_clip's `vision_cfg`, `quick_gelu`, and the weights with their prefix `visual.`."""
    if isinstance(trunk, HFVision) and trunk.model.config.model_type == "clip_vision_model":
        return _clip(trunk, model)
    if isinstance(trunk, HFVision) and trunk.model.config.model_type == "siglip_vision_model":
        config = trunk.model.config
        if config.hidden_act != "gelu":
            raise ModelError(
                f"open_clip's SigLIP towers have the exact GELU and this one has {config.hidden_act}; its features "
                "would differ. Use layout=huggingface"
            )
        name = siglip_name(config.patch_size, config.hidden_size, config.num_hidden_layers, trunk.image_size)
        state = siglip_to_timm(_bare(published_names(trunk.model)))
        return _timm(name, "map", state, model)
    if isinstance(trunk, EVA02):
        return _timm(eva02_name(trunk.sizes), "token", eva02_to_timm(trunk.state_dict()), model)
    if isinstance(trunk, TimmVision):
        return _timm(trunk.name, "", trunk.network.state_dict(), model)
    if isinstance(trunk, OpenClipVision) and hasattr(trunk.visual, "trunk"):
        values = trunk.settings["vision_cfg"]
        return _timm(
            values["timm_model_name"], values.get("timm_pool", ""), trunk.visual.trunk.state_dict(), model
        )
    if isinstance(trunk, OpenClipVision) and hasattr(trunk.visual, "transformer"):
        state = {f"visual.{name}": tensor for name, tensor in trunk.visual.state_dict().items()}
        state["visual.proj"] = _plain_projection(model).t()
        return trunk.settings["vision_cfg"], trunk.settings["quick_gelu"], state
    raise ModelError(
        f"open_clip has no tower like this {trunk.kind} one; use layout=native or layout=huggingface"
    )


def _clip(trunk: HFVision, model: LLM2CLIP) -> tuple[dict[str, Any], bool, dict[str, Tensor]]:
    config = trunk.model.config
    if config.hidden_act not in ("quick_gelu", "gelu") or trunk.pooling != "pooler":
        raise ModelError(
            f"open_clip's ViT has GELU or quick GELU and the class token, this tower has {config.hidden_act} and "
            f"pooling {trunk.pooling}"
        )
    state = {f"visual.{n}": t for n, t in clip_to_open_clip(_bare(published_names(trunk.model))).items()}
    state["visual.proj"] = _plain_projection(model).t()
    values = {
        "layers": config.num_hidden_layers,
        "width": config.hidden_size,
        "head_width": config.hidden_size // config.num_attention_heads,
        "mlp_ratio": config.intermediate_size / config.hidden_size,
        "patch_size": config.patch_size,
        "norm_kwargs": {"eps": config.layer_norm_eps},
    }
    return values, config.hidden_act == "quick_gelu", state


def _timm(
    name: str, pool: str, state: Mapping[str, Tensor], model: LLM2CLIP
) -> tuple[dict[str, Any], bool, dict[str, Tensor]]:
    tensors = {f"visual.trunk.{part}": tensor for part, tensor in state.items()}
    projection = model.visual_projection
    values: dict[str, Any] = {
        "timm_model_name": name,
        "timm_model_pretrained": False,
        "timm_pool": pool,
        "timm_proj": "none" if isinstance(projection, torch.nn.Identity) else "linear",
    }
    if isinstance(projection, torch.nn.Linear):
        tensors["visual.head.proj.weight"] = projection.weight
        if projection.bias is not None:
            tensors["visual.head.proj.bias"] = projection.bias
            values["timm_proj_bias"] = True
    return values, False, tensors


def _plain_projection(model: LLM2CLIP) -> Tensor:
    """The projection's weight; open_clip's ViT has one, and no bias."""
    projection = model.visual_projection
    if isinstance(projection, torch.nn.Identity):
        return torch.eye(model.settings.embed_dim)
    assert isinstance(projection, torch.nn.Linear)
    if projection.bias is not None:
        raise ModelError("open_clip's ViT has a projection without bias, and model.projection is affine")
    return projection.weight


def _text_side(model: LLM2CLIP, quick_gelu: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """open_clip's `text_cfg`, and the weights without their prefix `text.`."""
    tower = model.clip_text
    if tower is not None and model.text_projection is not None:
        config = tower.model.config
        wanted = "quick_gelu" if quick_gelu else "gelu"
        if config.model_type == "clip_text_model" and config.hidden_act == wanted:
            state = clip_text_to_open_clip(tower.model.state_dict())
            state["text_projection"] = model.text_projection.weight.t()
            return {
                "context_length": config.max_position_embeddings,
                "vocab_size": config.vocab_size,
                "width": config.hidden_size,
                "heads": config.num_attention_heads,
                "layers": config.num_hidden_layers,
                "mlp_ratio": config.intermediate_size / config.hidden_size,
            }, state
    width, hidden = _STAND_IN["width"], 4 * _STAND_IN["width"]
    block = "transformer.resblocks.0"
    zeros = {
        "token_embedding.weight": (_STAND_IN["vocab_size"], width),
        "positional_embedding": (_STAND_IN["context_length"], width),
        "ln_final.weight": (width,),
        "ln_final.bias": (width,),
        "text_projection": (width, model.settings.embed_dim),
        f"{block}.attn.in_proj_weight": (3 * width, width),
        f"{block}.attn.in_proj_bias": (3 * width,),
        f"{block}.attn.out_proj.weight": (width, width),
        f"{block}.attn.out_proj.bias": (width,),
        f"{block}.mlp.c_fc.weight": (hidden, width),
        f"{block}.mlp.c_fc.bias": (hidden,),
        f"{block}.mlp.c_proj.weight": (width, hidden),
        f"{block}.mlp.c_proj.bias": (width,),
        **{f"{block}.{norm}.{kind}": (width,) for norm in ("ln_1", "ln_2") for kind in ("weight", "bias")},
    }
    return dict(_STAND_IN), {name: torch.zeros(shape) for name, shape in zeros.items()}


def _trunk_state(trunk: VisionTrunk, image: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tower's weights under our names, of those that begin with `visual.`; its projection is left out."""
    inside = {
        name: tensor
        for name, tensor in image.items()
        if name != "visual.proj" and not name.startswith("visual.head.")
    }
    if isinstance(trunk, TimmVision):
        return {f"network.{name.removeprefix('visual.trunk.')}": tensor for name, tensor in inside.items()}
    if isinstance(trunk, OpenClipVision):
        return inside
    if isinstance(trunk, EVA02):
        return eva02_from_timm(
            {name.removeprefix("visual.trunk."): tensor for name, tensor in inside.items()}
        )
    named, _ = from_repository(inside)
    return {f"model.{name[len(VISION) :]}": tensor for name, tensor in named.items()}


def _bare(state: Mapping[str, Tensor], prefix: str = "vision_model.") -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items()}
