"""Symmetric InfoNCE with groups and weights by its definition: the whole matrix, a target, a mask."""

from __future__ import annotations

import torch
from torch import Tensor


def cross_entropies(logits: Tensor, target: Tensor, mask: Tensor, smoothing: float) -> Tensor:
    """Per row, over the columns that are not masked; zero for rows whose target is empty."""
    kept = (~mask).to(logits.dtype)
    even = kept / kept.sum(1, keepdim=True)
    size = target.sum(1, keepdim=True)
    aim = (1 - smoothing) * target / size.clamp(min=1) + smoothing * even
    logs = torch.log_softmax(logits.masked_fill(mask, -torch.inf), dim=1).masked_fill(mask, 0.0)
    return torch.where(size[:, 0] > 0, -(aim * logs).sum(1), 0.0)


def dense_infonce(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    *,
    groups: Tensor | None = None,
    y_groups: Tensor | None = None,
    same_group: str = "mask",
    weights: Tensor | None = None,
    y_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """What `infonce_loss` means, on one process, O(B·C) memory."""
    logits = scale * x @ y.T
    two_sets = y_groups is not None and same_group == "positive"
    own = torch.eye(*logits.shape, dtype=torch.bool)
    same = torch.zeros_like(own)
    if groups is not None:
        others = groups if y_groups is None else y_groups
        same = (groups[:, None] == others) & (groups >= 0)[:, None]
    mask, target = torch.zeros_like(own), own
    if same_group == "mask":
        mask = same & ~own
    else:
        target = same if two_sets else same | own
    rows = cross_entropies(logits, target.to(logits.dtype), mask, label_smoothing)
    columns = cross_entropies(logits.T, target.T.to(logits.dtype), mask.T, label_smoothing)
    weight = torch.ones_like(rows) if weights is None else weights
    if not two_sets:
        terms = 0.5 * (rows + columns) * weight
        if reduction == "none":
            return terms
        return terms.sum() / weight.sum() if reduction == "mean" else terms.sum()
    weight = weight * target.any(1)
    column_weight = (torch.ones_like(columns) if y_weights is None else y_weights) * target.any(0)
    terms = [0.5 * rows * weight, 0.5 * columns * column_weight]
    if reduction == "none":
        return torch.cat(terms)
    if reduction == "sum":
        return terms[0].sum() + terms[1].sum()
    return terms[0].sum() / weight.sum() + terms[1].sum() / column_weight.sum()
