"""Tiny whole CLIP models with tokenizer, and LLM2CLIP models over tiny towers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from llm2clip.models import LLM2CLIP
from llm2clip.settings import ModelSettings, VisionSettings
from tests.tiny_models import tiny_tokenizer
from tests.vision_kit import TINY, hf_vision_model

LLM_DIM = 12
CONTEXT = 10


def clip_tokenizer() -> Any:
    """A byte-level tokenizer that puts `<s>` before and its last token after a text, as CLIP's does."""
    from tokenizers import processors

    tokenizer = tiny_tokenizer()
    # an id of its own: 2, that of `</s>`, would mean the last id of all, as in OpenAI's first configurations
    tokenizer.add_special_tokens({"eos_token": "<|endoftext|>"})
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A <|endoftext|>",
        special_tokens=[("<s>", 1), ("<|endoftext|>", tokenizer.eos_token_id)],
    )
    return tokenizer


def save_clip(folder: Path, kind: str = "clip", dim: int = 6, **vision: Any) -> Any:
    """A whole CLIP or SigLIP model as a transformers directory; returns the model."""
    import transformers

    text = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 300,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": 1,
        "pad_token_id": 0,
    }
    torch.manual_seed(5)
    sizes = {**TINY, **vision}
    tokenizer = clip_tokenizer()
    if kind == "clip":
        config = transformers.CLIPConfig(
            text_config={**text, "eos_token_id": tokenizer.eos_token_id},
            vision_config=sizes,
            projection_dim=dim,
        )
        model = transformers.CLIPModel(config)
    else:
        config = transformers.SiglipConfig(
            text_config={**text, "eos_token_id": tokenizer.eos_token_id, "projection_size": 16},
            vision_config=sizes,
        )
        model = transformers.SiglipModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def tiny_llm2clip(folder: Path, kind: str = "clip_vision_model", **options: Any) -> LLM2CLIP:
    """A model over a tiny transformers tower; every weight matters."""
    hf_vision_model(kind).save_pretrained(folder / "tower")
    vision = options.pop("vision", {})
    settings = ModelSettings(
        **{
            "embed_dim": 6,
            "adapter_depth": 2,
            "vision": VisionSettings(kind="transformers", path=str(folder / "tower"), **vision),
            **options,
        }
    )
    torch.manual_seed(1)
    model = LLM2CLIP(settings, LLM_DIM, {"model_type": "llama", "weights": "abc"})
    with torch.no_grad():
        for parameter in model.text_adapter.parameters():
            parameter.normal_(std=0.4)
    return model.eval()
