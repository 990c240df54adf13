"""Tiny vision towers of every family that the tests train, lock and cut up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from llm2clip.models import VisionTower, build_vision_tower
from llm2clip.models.hf_files import vision_class, vision_config
from llm2clip.settings import VisionSettings

TINY: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 4,
    "image_size": 16,
}
VITS: dict[str, dict[str, Any]] = {
    "clip_vision_model": TINY,
    "siglip_vision_model": TINY,
    "siglip2_vision_model": {**{k: v for k, v in TINY.items() if k != "image_size"}, "num_patches": 16},
    "dinov2": TINY,
    "dinov2_with_registers": {**TINY, "num_register_tokens": 3},
    # its training would shift and scale positions at random
    "dinov3_vit": {**TINY, "num_register_tokens": 2, "pos_embed_rescale": None},
    "vit": TINY,
}
CONVOLUTIONAL: dict[str, dict[str, Any]] = {
    "convnext": {"hidden_sizes": [4, 8, 12, 16], "depths": [1, 1, 1, 1], "image_size": 32},
}


def hf_vision_model(kind: str) -> Any:
    """A transformers vision model whose weights all matter."""
    torch.manual_seed(0)
    config = vision_config({"model_type": kind, **{**VITS, **CONVOLUTIONAL}[kind]})
    model = vision_class(config)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    return model.eval()


def hf_tower(folder: Path, kind: str, **options: Any) -> VisionTower:
    """A tower of that model, read from a directory."""
    hf_vision_model(kind).save_pretrained(folder)
    return build_vision_tower(VisionSettings(kind="transformers", path=str(folder), **options)).eval()


def eva02_tower(folder: Path, **options: Any) -> VisionTower:
    """A tiny EVA02 tower, read from a file of weights."""
    from safetensors.torch import save_file

    from tests.test_models_eva02 import published, tiny_eva02

    folder.mkdir(parents=True, exist_ok=True)
    save_file(published(tiny_eva02(), "LLM2CLIP"), folder / "tower.safetensors")
    path = str(folder / "tower.safetensors")
    return build_vision_tower(VisionSettings(kind="eva02", path=path, **options)).eval()


def any_tower(folder: Path, kind: str, **options: Any) -> VisionTower:
    """A tower by its transformers type, or `eva02`."""
    return eva02_tower(folder, **options) if kind == "eva02" else hf_tower(folder, kind, **options)


def vision_json(folder: Path, kind: str = "clip_vision_model") -> Path:
    """A config.json of a tiny model, for random weights."""
    path = folder / "vision.json"
    path.write_text(json.dumps({"model_type": kind, **VITS[kind]}))
    return path
