"""Tiny random models of every supported family, saved as real transformers directories."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

VOCAB = 300
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# every family of the support matrix; the windows are shorter than the test captions
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "qwen3": {"head_dim": 8},
    "mistral": {"sliding_window": 4},
    "gemma2": {"head_dim": 8, "sliding_window": 4},
    "gemma3_text": {"head_dim": 8, "sliding_window": 4, "sliding_window_pattern": 2},
    "phi3": {"sliding_window": 4},
}


def tiny_config(family: str, **changes: Any) -> Any:
    """Configuration of a tiny model."""
    from transformers import AutoConfig

    return AutoConfig.for_model(family, **{**SIZES, **FAMILIES[family], **changes})


def tiny_model(
    family: str, *, attn: str | None = None, seed: int = 0, head: bool = False, **changes: Any
) -> Any:
    """A tiny decoder with random weights, large enough that attention is not uniform; `head`: a causal LM."""
    from transformers import AutoModel, AutoModelForCausalLM

    torch.manual_seed(seed)
    extra = {} if attn is None else {"attn_implementation": attn}
    kind = AutoModelForCausalLM if head else AutoModel
    model = kind.from_config(tiny_config(family, **changes), **extra)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.3)
    return model.eval()


def tiny_tokenizer(*, eos: bool = True, pad: bool = True, bos: bool = False) -> Any:
    """A byte-level tokenizer with one token per byte and special tokens `<pad> <s> </s>` (ids 0, 1, 2)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate(special + alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.add_special_tokens([AddedToken(token, special=True) for token in special])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"eos_token": "</s>" if eos else None, "pad_token": "<pad>" if pad else None, "bos_token": "<s>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{k: v for k, v in names.items() if v})


def save_tiny(folder: Path, family: str = "llama", **options: Any) -> Path:
    """Write a tiny model and its tokenizer as a transformers directory."""
    tokenizer = {k: options.pop(k) for k in ("eos", "pad", "bos") if k in options}
    tiny_model(family, **options).save_pretrained(folder)
    tiny_tokenizer(**tokenizer).save_pretrained(folder)
    return folder


def save_tiny_clip(folder: Path, *, siglip: bool = False, dim: int = 8, seed: int = 0) -> Path:
    """Write a whole tiny CLIP (or SigLIP) model of 8-pixel images, with its tokenizer and preprocessing."""
    import json

    import transformers

    tower = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**tower, "vocab_size": VOCAB, "max_position_embeddings": 24, "pad_token_id": 0, "eos_token_id": 2}
    vision = {**tower, "image_size": 8, "patch_size": 4}
    torch.manual_seed(seed)
    model: Any
    if siglip:
        text |= {"projection_size": dim}
        config = transformers.SiglipConfig(text_config=text, vision_config=vision | {"hidden_size": dim})
        model = transformers.SiglipModel(config)
    else:
        model = transformers.CLIPModel(
            transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=dim)
        )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    preprocessing = {
        "image_mean": [0.5, 0.4, 0.3], "image_std": [0.3, 0.2, 0.25], "resample": 3,
        "size": {"shortest_edge": 8}, "do_center_crop": True, "crop_size": {"height": 8, "width": 8},
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    return folder
