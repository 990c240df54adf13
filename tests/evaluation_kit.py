"""Tiny models for the benchmarks: two LLM2CLIP models of one tiny LLM, and a tiny CLIP beside them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from llm2clip.models.caption_encoder import CaptionEncoder
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.settings import ModelSettings, VisionSettings
from tests.clip_kit import save_clip
from tests.tiny_models import save_tiny
from tests.vision_kit import TINY


@dataclass(frozen=True)
class Kit:
    """Directories of the models."""

    llm: Path
    first: Path
    second: Path
    clip: Path


def build_kit(root: Path) -> Kit:
    """A decoder LLM, two CLIP stages on it with other weights, and a transformers CLIP."""
    llm = save_tiny(root / "llm")
    encoder = CaptionEncoder.from_pretrained(llm)
    config = {"model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 24, "patch_size": 4,
              "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8}  # fmt: skip
    (root / "vision.json").write_text(json.dumps(config))
    vision = VisionSettings(kind="transformers", path=str(root / "vision.json"), image_size=8)
    for seed, name in enumerate(("first", "second")):
        torch.manual_seed(seed)
        settings = ModelSettings(vision=vision, embed_dim=6, adapter_depth=1)
        model = LLM2CLIP(settings, encoder.dim, encoder.fingerprint())
        model.save_pretrained(root / name / "result")
    return Kit(llm, root / "first", root / "second", save_baseline(root / "clip"))


def save_baseline(folder: Path, kind: str = "clip") -> Path:
    """A tiny transformers CLIP or SigLIP with its image processor and tokenizer."""
    save_clip(folder, kind)
    size = {"height": TINY["image_size"], "width": TINY["image_size"]}
    processor = {
        "image_processor_type": "CLIPImageProcessor" if kind == "clip" else "SiglipImageProcessor",
        "size": {"shortest_edge": TINY["image_size"]} if kind == "clip" else size, "crop_size": size,
        "do_center_crop": kind == "clip", "do_resize": True, "do_rescale": True, "do_normalize": True,
        "image_mean": [0.48, 0.45, 0.4], "image_std": [0.26, 0.26, 0.27], "resample": 3,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder
