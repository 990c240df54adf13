"""From token states to one embedding per caption."""

from __future__ import annotations

import torch
from torch import Tensor

from llm2clip.settings import Pooling


def pool(hidden: Tensor, pool_mask: Tensor, kind: Pooling) -> Tensor:
    """Pool the token states that `pool_mask` marks.

    Args:
        hidden: (B, L, dim), any float dtype; positions outside the mask may hold anything, NaN included, but for
            the first ones under `bos`.
        pool_mask: (B, L) boolean, at least one True in every row.
        kind: `mean`; `weighted_mean` (weights 1, 2, ..., n over the n marked tokens, so that under causal
            attention tokens that have seen more count more); `eos` and `last` (the last marked token); `bos` (the
            first token of the row, marked or not).

    Returns:
        (B, dim) fp32 (fp64 for fp64), not normalised.
    """
    hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    if kind == "bos":
        return hidden[:, 0]
    if kind in ("eos", "last"):
        length = pool_mask.shape[1]
        last = length - 1 - pool_mask.to(torch.int32).flip(1).argmax(dim=1)
        return hidden[torch.arange(hidden.shape[0], device=hidden.device), last]
    weights = pool_mask.to(hidden.dtype)
    if kind == "weighted_mean":
        weights = weights.cumsum(dim=1) * weights
    weights = weights / weights.sum(dim=1, keepdim=True)
    # zeroed first: 0 * NaN would be NaN
    states = hidden.masked_fill(~pool_mask[..., None], 0.0)
    return torch.einsum("bl,bld->bd", weights, states)
