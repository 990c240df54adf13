"""Frozen LLM weights in 8 or 4 bits, through transformers' own bitsandbytes loader (QLoRA, arXiv 2305.14314)."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import nn

from llm2clip.errors import ModelError
from llm2clip.settings import Quantization


def quantized_loading(
    kind: Quantization, dtype: torch.dtype, device: str | torch.device, gguf_file: str | None
) -> dict[str, Any]:
    """Arguments of `from_pretrained` that load a model quantised, on its device; none for `none`.

    Args:
        kind: `8bit` (LLM.int8) or `4bit` (NF4 with doubly quantised scales).
        dtype: dtype of the products and of the layers that stay as they are.
        device: where the weights go; a quantised model is not moved afterwards.
        gguf_file: a GGUF file is quantised already and refused.

    Raises:
        ModelError: bitsandbytes is missing, or the weights come from a GGUF file.
    """
    if kind == "none":
        return {}
    if gguf_file is not None:
        raise ModelError(
            f"llm.quantization={kind} does not go with a GGUF file, whose weights are dequantised on loading; convert "
            "it with llm2clip.models.convert_gguf first, or set llm.quantization=none"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            f"llm.quantization={kind} needs bitsandbytes: pip install 'llm2clip[quantized]', or set "
            "llm.quantization=none"
        )
    from transformers import BitsAndBytesConfig

    if kind == "8bit":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    return {"quantization_config": config, "device_map": {"": torch.device(device)}}


def is_quantized(model: nn.Module) -> bool:
    """Whether a transformers model holds bitsandbytes weights."""
    return bool(getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False))


def require_unquantized(model: nn.Module) -> None:
    """Refuse to export quantised weights, which no other program would read.

    Raises:
        ModelError: the model is quantised.
    """
    if is_quantized(model):
        raise ModelError(
            "a quantised encoder cannot be merged and exported; save its adapter, and load that on the unquantised "
            "base to export"
        )
