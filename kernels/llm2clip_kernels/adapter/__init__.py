"""LLM2CLIP's residual adapter: fused row operations between library GEMMs, half the saved activations."""

from __future__ import annotations

from .compose import BlockParameters, adapter
from .head import layer_norm_linear
from .op import adapter_block
from .reference import adapter_block_reference, adapter_reference, layer_norm_linear_reference

__all__ = [
    "BlockParameters",
    "adapter",
    "adapter_block",
    "adapter_block_reference",
    "adapter_reference",
    "layer_norm_linear",
    "layer_norm_linear_reference",
]
