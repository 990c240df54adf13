"""Patch dropout: a training step sees a random part of each image's patches (FLIP, arXiv 2212.00794)."""

from __future__ import annotations

import torch
from torch import Tensor


def kept_patches(batch: int, patches: int, rate: float, device: torch.device) -> Tensor:
    """Random patches of each image, drawn from torch's generator.

    Args:
        batch: images B.
        patches: patches N of an image.
        rate: share to leave out, in [0, 1).
        device: where the indices go.

    Returns:
        (B, K) int64, different indices below N in each row; K = max(1, floor(N (1 - rate))).
    """
    count = max(1, int(patches * (1.0 - rate)))
    return torch.rand(batch, patches, device=device).argsort(dim=1)[:, :count]


def keep_tokens(tokens: Tensor, kept: Tensor, prefix: int) -> Tensor:
    """The first `prefix` tokens of each row and the patches that `kept` (B, K) names.

    Args:
        tokens: (B, prefix + N, D).
        kept: (B, K) indices of patches, counted without the prefix.
        prefix: class and register tokens, which stay.

    Returns:
        (B, prefix + K, D).
    """
    index = kept[..., None].expand(-1, -1, tokens.shape[-1])
    return torch.cat([tokens[:, :prefix], tokens[:, prefix:].gather(1, index)], dim=1)


def keep_rotations(table: Tensor, kept: Tensor) -> Tensor:
    """Rows of a rotary table (N, Dh) for the patches that each image keeps: (B, 1, K, Dh)."""
    return table[kept][:, None]
