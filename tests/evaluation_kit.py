"""Tiny models for the benchmarks: two LLM2CLIP models of one tiny LLM, and a tiny CLIP beside them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from llm2clip.models.caption_encoder import CaptionEncoder
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.settings import ModelSettings, VisionSettings
from tests.tiny_models import VOCAB, save_tiny, tiny_tokenizer


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
    return Kit(llm, root / "first", root / "second", save_clip(root / "clip"))


def save_clip(folder: Path, kind: str = "clip") -> Path:
    """A tiny transformers CLIP or SigLIP with its image processor and tokenizer."""
    from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 8, "patch_size": 4}  # fmt: skip
    text = {**vision, "vocab_size": VOCAB, "max_position_embeddings": 24, "pad_token_id": 0,
            "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
    torch.manual_seed(5)
    model = (
        CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=6))
        if kind == "clip"
        else SiglipModel(SiglipConfig(vision_config=vision, text_config=text))
    )
    model.save_pretrained(folder)
    tiny_tokenizer(bos=True).save_pretrained(folder)
    size = {"height": 8, "width": 8}
    processor = {
        "image_processor_type": "CLIPImageProcessor" if kind == "clip" else "SiglipImageProcessor",
        "size": {"shortest_edge": 8} if kind == "clip" else size, "crop_size": size,
        "do_center_crop": kind == "clip", "do_resize": True, "do_rescale": True, "do_normalize": True,
        "image_mean": [0.48, 0.45, 0.4], "image_std": [0.26, 0.26, 0.27], "resample": 3,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder
