"""Names and settings of open_clip's model files, and how ours translate."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, get_args

import torch
from torch import Tensor

from llm2clip.data.images import CLIP_MEAN, CLIP_STD
from llm2clip.errors import ModelError
from llm2clip.models.eva02 import EVA02Config
from llm2clip.models.preprocessing import Preprocessing, triple
from llm2clip.models.published_names import OPENAI, OPENAI_BLOCK, TIMM, TIMM_BLOCK
from llm2clip.settings import Fit, Interpolation

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
_MODES: dict[str, Fit] = {"shortest": "crop", "squash": "squash", "longest": "pad"}
_WHITE = 255

# (patch, width, blocks) -> timm's name without the image size, and the sizes there are
_SIGLIP = {
    (16, 768, 12): ("vit_base_patch16_siglip", (224, 256, 384, 512)),
    (16, 1024, 24): ("vit_large_patch16_siglip", (256, 384, 512)),
    (14, 1152, 27): ("vit_so400m_patch14_siglip", (224, 378, 384)),
    (16, 1152, 27): ("vit_so400m_patch16_siglip", (256, 384, 512)),
    (16, 1536, 40): ("vit_giantopt_patch16_siglip", (256, 384)),
}
_EVA02 = {
    (16, 768, 12): ("eva02_base_patch16_clip", (224,)),
    (14, 1024, 24): ("eva02_large_patch14_clip", (224, 336)),
}
# EVA02's parts by our names and by timm's
_EVA_PARTS = {
    "attn.inner_attn_ln": "attn.norm",
    "mlp.w1": "mlp.fc1_g",
    "mlp.w2": "mlp.fc1_x",
    "mlp.ffn_ln": "mlp.norm",
    "mlp.w3": "mlp.fc2",
}

_OPENAI_TEXT = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}


def to_preprocess(preprocessing: Preprocessing) -> dict[str, Any]:
    """open_clip's `preprocess_cfg`; it knows bicubic and bilinear resampling, and no crop of a larger image."""
    modes = {fit: mode for mode, fit in _MODES.items()}
    return {
        "size": preprocessing.image_size,
        "mode": "RGB",
        "mean": list(preprocessing.mean),
        "std": list(preprocessing.std),
        "interpolation": "bilinear" if preprocessing.interpolation == "bilinear" else "bicubic",
        "resize_mode": modes[preprocessing.fit],
        "fill_color": _WHITE if preprocessing.fit == "pad" else 0,
    }


def from_preprocess(values: Mapping[str, Any], image_size: int) -> Preprocessing:
    """What open_clip's `preprocess_cfg` says of images; of what it does not say, open_clip's own defaults."""
    interpolation = str(values.get("interpolation", "bicubic"))
    return Preprocessing(
        image_size,
        triple(values.get("mean", CLIP_MEAN)),
        triple(values.get("std", CLIP_STD)),
        _MODES.get(str(values.get("resize_mode", "shortest")), "crop"),
        interpolation if interpolation in get_args(Interpolation) else "bicubic",  # type: ignore[arg-type]
    )


def siglip_name(patch: int, width: int, depth: int, image_size: int) -> str:
    """timm's name of a SigLIP tower.

    Raises:
        ModelError: timm has none of these sizes.
    """
    return _timm_name("SigLIP", _SIGLIP, patch, width, depth, image_size)


def eva02_name(sizes: EVA02Config) -> str:
    """timm's name of an EVA02 tower.

    Raises:
        ModelError: timm has none of these sizes.
    """
    return _timm_name("EVA02", _EVA02, sizes.patch_size, sizes.width, sizes.depth, sizes.image_size)


def _timm_name(
    family: str,
    known: Mapping[tuple[int, int, int], tuple[str, tuple[int, ...]]],
    patch: int,
    width: int,
    depth: int,
    image_size: int,
) -> str:
    name, sizes = known.get((patch, width, depth), ("", ()))
    if image_size not in sizes:
        raise ModelError(
            f"open_clip has no {family} tower of patch size {patch}, width {width}, {depth} blocks for images of "
            f"{image_size} pixels; it builds them by name: "
            + ", ".join(f"{start}_{{{','.join(map(str, there))}}}" for start, there in known.values())
        )
    return f"{name}_{image_size}"


def clip_to_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A CLIP image tower under transformers' names -> under open_clip's, without `visual.`."""
    named = _blocks(state, "encoder.layers", "transformer.resblocks", OPENAI_BLOCK, "attn.in_proj_")
    return _outer(named, OPENAI)


def clip_text_to_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A CLIP text tower under transformers' names -> under open_clip's, without `text.`."""
    named = _blocks(state, "encoder.layers", "transformer.resblocks", OPENAI_BLOCK, "attn.in_proj_")
    return _outer(named, _OPENAI_TEXT)


def siglip_to_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A SigLIP image tower under transformers' names -> under timm's."""
    named = _blocks(state, "encoder.layers", "blocks", TIMM_BLOCK, "attn.qkv.")
    for kind in ("weight", "bias"):
        queries, keys, values = named.pop(f"head.attention.in_proj_{kind}").chunk(3)
        named[f"attn_pool.q.{kind}"] = queries
        named[f"attn_pool.kv.{kind}"] = torch.cat([keys, values])
    named["pos_embed"] = named.pop("embeddings.position_embedding.weight")[None]
    return _outer(named, TIMM)


def eva02_to_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An EVA02 tower -> under timm's names."""
    return _parts(state, _EVA_PARTS)


def eva02_from_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An EVA02 tower under timm's names -> under ours."""
    return _parts(state, {theirs: ours for ours, theirs in _EVA_PARTS.items()})


def _parts(state: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    pattern = re.compile(r"(blocks\.\d+\.)(.+)\.(weight|bias)")
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        found = pattern.fullmatch(name)
        renamed[f"{found[1]}{names.get(found[2], found[2])}.{found[3]}" if found else name] = tensor
    return renamed


def _outer(state: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    inverse = {ours: theirs for theirs, ours in names.items()}
    return {inverse.get(name, name): tensor for name, tensor in state.items()}


def _blocks(
    state: Mapping[str, Tensor], old: str, new: str, names: Mapping[str, str], joined: str
) -> dict[str, Tensor]:
    """Give the blocks the names that `names` has ours under, queries, keys and values joined into one layer."""
    inverse = {ours: theirs for theirs, ours in names.items()}
    pattern = re.compile(rf"{re.escape(old)}\.(\d+)\.(.+)\.(weight|bias)")
    renamed: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        found = pattern.fullmatch(name)
        if not found:
            renamed[name] = tensor
            continue
        place, part, kind = f"{new}.{found[1]}.", found[2], found[3]
        if attention := re.fullmatch(r"self_attn\.([qkv])_proj", part):
            parts.setdefault(f"{place}{joined}{kind}", {})[attention[1]] = tensor
        else:
            renamed[f"{place}{inverse.get(part, part)}.{kind}"] = tensor
    renamed.update({name: torch.cat([three[x] for x in "qkv"]) for name, three in parts.items()})
    return renamed
