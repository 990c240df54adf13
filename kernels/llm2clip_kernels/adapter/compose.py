"""`adapter`: LLM2CLIP's whole text projection from the fused ops."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..l2_normalize import l2_normalize
from .head import layer_norm_linear
from .op import adapter_block

# ln_weight (D,), ln_bias (D,), w1 (hidden, D), b1 (hidden,), w2 (D, hidden), b2 (D,)
BlockParameters = tuple[Tensor | None, Tensor | None, Tensor, Tensor | None, Tensor, Tensor | None]
# ln_weight (D,), ln_bias (D,), weight (K, D), bias (K,)
HeadParameters = tuple[Tensor | None, Tensor | None, Tensor, Tensor | None]


def adapter(
    x: Tensor,
    blocks: Sequence[BlockParameters],
    head: HeadParameters,
    *,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    normalize_input: bool = True,
    normalize_output: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """L2-normalise -> residual blocks -> LayerNorm -> Linear -> L2-normalise where asked.

    With four blocks of twice the width this is LLM2CLIP's published text adapter (TextProj), parameter for
    parameter. Each part is an op of its own; see `adapter_block` for arithmetic, gradients and autocast.

    Args:
        x: (..., D) LLM embeddings.
        blocks: of each block LayerNorm's weight and bias, and both Linear layers' weights and biases.
        head: LayerNorm's weight and bias, and the last Linear's.
        eps: of every LayerNorm.
        dropout_p: inside the blocks; pass 0 outside training.
        normalize_input: scale the embeddings to unit length first.
        normalize_output: scale the features to unit length.
        dtype: of the features; None for what the last Linear gives.

    Returns:
        (..., K) features.

    Raises:
        TypeError, ValueError: as in `adapter_block`.
    """
    if normalize_input:
        x = l2_normalize(x)
    for block in blocks:
        x = adapter_block(x, *block, eps=eps, dropout_p=dropout_p)
    y = layer_norm_linear(x, *head, eps=eps)
    if normalize_output:
        return l2_normalize(y, dtype=dtype)
    return y if dtype is None else y.to(dtype)


__all__ = ["BlockParameters", "HeadParameters", "adapter"]
