"""Names in published LLM2CLIP checkpoints, and the same weights under the names of our modules.

Every reader returns all tensors it was given: known ones under our names, unknown ones under their own. Names of ours:
`vision.<name in the tower's network>`, `visual_projection.*`, `text_adapter.adaptor.*`, `logit_scale`, `logit_bias`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

Family = Literal["clip", "siglip", "eva02", "transformers"]
Rename = Callable[[str, Tensor], dict[str, Tensor]]
VISION = "vision."
# EVA's own head, and the one behind a timm tower
_HEAD = re.compile(r"visual\.head\.(?:proj\.)?(weight|bias)")
_ADAPTERS = ("text.text_adaptor.", "text.text_proj.text_adaptor.")
# renamed parts of one block: open_clip's ViT, timm's ViT, and EVA in transformers' style
OPENAI_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
TIMM_BLOCK = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.proj": "self_attn.out_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_EVA_BLOCK = {
    "layer_norm1": "norm1",
    "layer_norm2": "norm2",
    "self_attn.q_proj": "attn.q_proj",
    "self_attn.k_proj": "attn.k_proj",
    "self_attn.v_proj": "attn.v_proj",
    "self_attn.inner_attn_ln": "attn.inner_attn_ln",
    "self_attn.out_proj": "attn.proj",
    "mlp.fc1": "mlp.w1",
    "mlp.fc2": "mlp.w2",
    "mlp.fc3": "mlp.w3",
    "mlp.ffn_ln": "mlp.ffn_ln",
}
OPENAI = {
    "conv1.weight": "embeddings.patch_embedding.weight",
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_pre.weight": "pre_layrnorm.weight",
    "ln_pre.bias": "pre_layrnorm.bias",
    "ln_post.weight": "post_layernorm.weight",
    "ln_post.bias": "post_layernorm.bias",
}
TIMM = {
    "patch_embed.proj.weight": "embeddings.patch_embedding.weight",
    "patch_embed.proj.bias": "embeddings.patch_embedding.bias",
    "norm.weight": "post_layernorm.weight",
    "norm.bias": "post_layernorm.bias",
    "attn_pool.latent": "head.probe",
    "attn_pool.proj.weight": "head.attention.out_proj.weight",
    "attn_pool.proj.bias": "head.attention.out_proj.bias",
    "attn_pool.norm.weight": "head.layernorm.weight",
    "attn_pool.norm.bias": "head.layernorm.bias",
    "attn_pool.mlp.fc1.weight": "head.mlp.fc1.weight",
    "attn_pool.mlp.fc1.bias": "head.mlp.fc1.bias",
    "attn_pool.mlp.fc2.weight": "head.mlp.fc2.weight",
    "attn_pool.mlp.fc2.bias": "head.mlp.fc2.bias",
}
_EVA = {
    "embeddings.patch_embedding.weight": "patch_embed.proj.weight",
    "embeddings.patch_embedding.bias": "patch_embed.proj.bias",
    "post_layernorm.weight": "norm.weight",
    "post_layernorm.bias": "norm.bias",
}


def from_repository(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Family]:
    """The layout of the LLM2CLIP repository's `.pt` files: `visual.*`, `text.text_adaptor.*`.

    Three kinds of tower: EVA02 (`visual.blocks.*`, projection `visual.head.*`), OpenAI's ViT as in open_clip
    (`visual.transformer.*`, projection `visual.proj`), SigLIP as in timm (`visual.trunk.*`, no projection).
    """
    if any(name.startswith("visual.trunk.") for name in tensors):
        family, tower, prefix = "siglip", _siglip_of_timm, "visual.trunk."
    elif any(name.startswith("visual.transformer.") for name in tensors):
        family, tower, prefix = "clip", _clip_of_openai, "visual."
    else:
        family, tower, prefix = "eva02", _keep, "visual."
    named: dict[str, Tensor] = {}
    inside: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        adapter = next((start for start in _ADAPTERS if name.startswith(start)), None)
        if adapter:
            named[f"text_adapter.adaptor.{name[len(adapter) :]}"] = tensor
        elif name == "visual.proj":
            named["visual_projection.weight"] = tensor.t()
        elif head := _HEAD.fullmatch(name):
            named[f"visual_projection.{head[1]}"] = tensor
        elif name.startswith(prefix):
            inside[name[len(prefix) :]] = tensor
        else:
            named[name] = tensor
    named.update({VISION + name: tensor for name, tensor in tower(inside).items()})
    return named, family  # type: ignore[return-value]


def from_hugging_face(tensors: Mapping[str, Tensor], eva: bool) -> dict[str, Tensor]:
    """The layout of the checkpoints on the hub: `vision_model.*`, `visual_projection.*`, `text_adapter.adaptor.*`.

    Args:
        tensors: the weights.
        eva: the tower is EVA's (`EvaCLIPModel`), whose layers have names of their own there.
    """
    start = "vision_model."
    inside = {name[len(start) :]: tensor for name, tensor in tensors.items() if name.startswith(start)}
    named = {name: tensor for name, tensor in tensors.items() if not name.startswith(start)}
    tower = _eva_of_transformers(inside) if eva else _without_position_ids(inside)
    named.update({VISION + name: tensor for name, tensor in tower.items()})
    return named


def _keep(inside: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return dict(inside)


def _clip_of_openai(inside: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return _renamed(
        inside, OPENAI, OPENAI_BLOCK, "transformer.resblocks", "encoder.layers", _openai_attention
    )


def _siglip_of_timm(inside: Mapping[str, Tensor]) -> dict[str, Tensor]:
    named = _renamed(inside, TIMM, TIMM_BLOCK, "blocks", "encoder.layers", _timm_attention)
    if "pos_embed" in named and named["pos_embed"].ndim == 3:
        named["embeddings.position_embedding.weight"] = named.pop("pos_embed")[0]
    for kind, joined in (("weight", "in_proj_weight"), ("bias", "in_proj_bias")):
        q, kv = f"attn_pool.q.{kind}", f"attn_pool.kv.{kind}"
        if q in named and kv in named:
            named[f"head.attention.{joined}"] = torch.cat([named.pop(q), named.pop(kv)])
    return named


def _eva_of_transformers(inside: Mapping[str, Tensor]) -> dict[str, Tensor]:
    named = _renamed(
        _without_position_ids(inside), _EVA, _EVA_BLOCK, "encoder.layers", "blocks", lambda part, tensor: {}
    )
    if "embeddings.class_embedding" in named:
        named["cls_token"] = named.pop("embeddings.class_embedding").reshape(1, 1, -1)
    if "embeddings.position_embedding.weight" in named:
        named["pos_embed"] = named.pop("embeddings.position_embedding.weight")[None]
    return {re.sub(r".*\brope\.freqs_", "rope.freqs_", name): tensor for name, tensor in named.items()}


def _without_position_ids(inside: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without 0, 1, 2, ..., which files of older transformers versions carry along."""
    return {
        name: tensor
        for name, tensor in inside.items()
        if not (
            name == "embeddings.position_ids"
            and tensor.device.type != "meta"
            and torch.equal(tensor.flatten(), torch.arange(tensor.numel()))
        )
    }


def _renamed(
    inside: Mapping[str, Tensor],
    outer: Mapping[str, str],
    inner: Mapping[str, str],
    blocks: str,
    target: str,
    attention: Rename,
) -> dict[str, Tensor]:
    """Rename the weights outside the blocks by `outer`, those of block i by `inner` or `attention`."""
    pattern = re.compile(rf"{re.escape(blocks)}\.(\d+)\.(.+)")
    named: dict[str, Tensor] = {}
    for name, tensor in inside.items():
        found = pattern.fullmatch(name)
        if found is None:
            named[outer.get(name, name)] = tensor
            continue
        place, part = f"{target}.{found[1]}.", found[2]
        layer, _, kind = part.rpartition(".")
        if layer in inner:
            named[f"{place}{inner[layer]}.{kind}"] = tensor
        elif parts := attention(part, tensor):
            named.update({place + own: piece for own, piece in parts.items()})
        else:
            named[name] = tensor
    return named


def _openai_attention(part: str, tensor: Tensor) -> dict[str, Tensor]:
    return _split(tensor, part.rpartition("_")[2]) if part.startswith("attn.in_proj_") else {}


def _timm_attention(part: str, tensor: Tensor) -> dict[str, Tensor]:
    return _split(tensor, part.rpartition(".")[2]) if part.startswith("attn.qkv.") else {}


def _split(tensor: Tensor, kind: str) -> dict[str, Tensor]:
    """Queries, keys and values that were one layer."""
    if len(tensor) % 3:
        return {}
    return {f"self_attn.{x}_proj.{kind}": piece for x, piece in zip("qkv", tensor.chunk(3), strict=True)}


def eva_to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An EVA02 tower's weights under the names that `EvaCLIPModel` gives them, without `vision_model.`."""
    outer = {ours: theirs for theirs, ours in _EVA.items()}
    inner = {ours: theirs for theirs, ours in _EVA_BLOCK.items()}
    named = _renamed(state, outer, inner, "blocks", "encoder.layers", lambda part, tensor: {})
    named["embeddings.class_embedding"] = named.pop("cls_token").reshape(-1)
    named["embeddings.position_embedding.weight"] = named.pop("pos_embed")[0]
    return named
