"""Both halves of a tiny random LLM2CLIP, saved as `llm2clip` saves them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from llm2clip.models import LLM2CLIP, CaptionEncoder
from llm2clip.settings import LoraSettings, ModelSettings, VisionSettings
from tests.tiny_models import save_tiny

VISION = {
    "model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 2, "patch_size": 4, "image_size": 8,
}  # fmt: skip


def save_both(root: Path) -> tuple[Path, Path, Path]:
    """Directories of the LLM, of an adapter that does something, and of a CLIP model for the two."""
    llm = save_tiny(root / "llm")
    encoder = CaptionEncoder.from_pretrained(llm)
    encoder.add_lora(LoraSettings(rank=2))
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    encoder.save_adapter(root / "adapter")
    encoder = CaptionEncoder.from_pretrained(llm, adapter=root / "adapter")
    (root / "vision.json").write_text(json.dumps(VISION))
    vision = VisionSettings(kind="transformers", path=str(root / "vision.json"), image_size=8)
    torch.manual_seed(3)
    settings = ModelSettings(vision=vision, embed_dim=6, adapter_depth=1)
    LLM2CLIP(settings, encoder.dim, encoder.fingerprint()).save_pretrained(root / "clip")
    return llm, root / "adapter", root / "clip"


def pictures(count: int, size: int = 8) -> list[Image.Image]:
    random = np.random.default_rng(1)
    return [Image.fromarray(random.integers(0, 256, (size, size, 3), dtype=np.uint8)) for _ in range(count)]


def sentences(count: int) -> list[str]:
    return [f"{'very ' * (i % 4)}large number {i * i} in a row of {i}" for i in range(count)]
