"""What the adapter ops mean, in torch's own words, every activation kept. Tests compare against this."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


def layer_norm_linear_reference(
    x: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    *,
    eps: float = 1e-5,
) -> Tensor:
    """LN(x) Wᵀ + b: (..., D) -> (..., K)."""
    return F.linear(F.layer_norm(x, x.shape[-1:], ln_weight, ln_bias, eps), weight, bias)


def adapter_block_reference(
    x: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    eps: float = 1e-5,
    keep: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """x + W2 drop(gelu(W1 LN(x) + b1)) + b2 with the erf form of GELU; `keep` (..., hidden) is dropout's mask."""
    inner = F.gelu(layer_norm_linear_reference(x, ln_weight, ln_bias, w1, b1, eps=eps))
    if keep is not None:
        inner = inner * keep / (1 - dropout_p)
    return x + F.linear(inner, w2, b2)


def adapter_reference(
    x: Tensor,
    blocks: Sequence[Sequence[Tensor | None]],
    head: Sequence[Tensor | None],
    *,
    eps: float = 1e-5,
    normalize_input: bool = True,
    normalize_output: bool = False,
) -> Tensor:
    """L2-normalise, every block, LayerNorm, Linear, and L2-normalise where asked. Arguments as in `adapter`."""
    if normalize_input:
        x = F.normalize(x, dim=-1)
    for block in blocks:
        x = adapter_block_reference(x, *block, eps=eps)  # type: ignore[arg-type]
    x = layer_norm_linear_reference(x, *head, eps=eps)  # type: ignore[arg-type]
    return F.normalize(x, dim=-1) if normalize_output else x
