"""What `lora_linear` means, in plain torch as peft composes it. Tests and benchmarks compare against this."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def lora_linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    *,
    keep: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """x Wᵀ + b + s·(drop(x) Aᵀ) Bᵀ; differentiable, every intermediate kept.

    Args:
        x: (..., K).
        weight: (N, K), dtype of x.
        bias: (N,) or None.
        lora_a: (R, K); the low-rank product runs in its dtype.
        lora_b: (N, R).
        scaling: the multiplier s.
        keep: shape of x, True where dropout keeps; None for no dropout.
        dropout_p: share that is dropped; what is kept is divided by 1 - dropout_p.

    Returns:
        (..., N) in the dtype of x.
    """
    result = F.linear(x, weight, bias)
    dropped = x.to(lora_a.dtype)
    if keep is not None:
        dropped = torch.where(keep, dropped / (1 - dropout_p), torch.zeros_like(dropped))
    return (result + F.linear(F.linear(dropped, lora_a), lora_b) * scaling).to(result.dtype)
