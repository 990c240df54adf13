"""What every loss over pairs shares: its options, its reduction, and the conventions over a process group."""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from .. import distributed
from ..checks import accumulator
from ..distributed import Group
from .statistics import Transport

Reduction = Literal["mean", "sum", "none"]
GradReduction = Literal["ddp_mean", "sum"]


def transport_of(
    group: Group, gather: bool | Literal["ring"] | None, name: str, ring: bool = True
) -> Transport:
    """How other ranks' rows take part: as `gather` says, else exactly when a group is given.

    `ring`: whether this loss has a ring; raises ValueError where one is asked for without.
    """
    if gather not in (None, True, False, "ring"):
        raise ValueError(f"{name}: gather must be True, False, None or 'ring', got {gather!r}")
    if gather == "ring" and not ring:
        raise ValueError(f"{name}: gather='ring' is for infonce_loss and sigmoid_loss; use gather=True")
    if gather == "ring":
        return "ring"
    return "gather" if (group is not None if gather is None else gather) else "local"


def check_options(name: str, reduction: str, grad_reduction: str, label_smoothing: float = 0.0) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"{name}: reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    if grad_reduction not in ("ddp_mean", "sum"):
        raise ValueError(f"{name}: grad_reduction must be 'ddp_mean' or 'sum', got {grad_reduction!r}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"{name}: label_smoothing must lie in [0, 1], got {label_smoothing}")


def check_weights(weights: Tensor | None, rows: Tensor, label: str, name: str) -> Tensor | None:
    """Returns the weights in the accumulator's dtype; raises TypeError or ValueError."""
    if weights is None:
        return None
    if not isinstance(weights, Tensor) or weights.is_complex() or weights.dtype == torch.bool:
        came = weights.dtype if isinstance(weights, Tensor) else type(weights).__name__
        raise TypeError(f"{name}: {label} must be a tensor of real numbers, got {came}")
    if weights.shape != rows.shape[:1]:
        raise ValueError(
            f"{name}: {label} must hold one number for each of {rows.shape[0]} rows, got {tuple(weights.shape)}"
        )
    if weights.device != rows.device:
        raise ValueError(f"{name}: {label} must be on {rows.device}, got {weights.device}")
    return weights.to(accumulator(rows.dtype))


def reduce_terms(
    terms: Tensor,
    total: int,
    reduction: str,
    grad_reduction: str,
    group: Group,
    distributed_: bool,
    weights: Tensor | None = None,
) -> Tensor:
    """One term per row of this rank to a loss over all ranks.

    Args:
        terms: (B,).
        total: rows over all ranks.
        reduction: "mean" (weighted, where there are weights), "sum", or "none".
        grad_reduction, group: as in `infonce_loss`; `distributed_`: whether there are other ranks.
        weights: (B,) or None.
    """
    if weights is not None:
        terms = terms * weights
    if reduction == "mean":
        if weights is None:
            terms = terms / total
        else:
            weight = weights.sum()
            terms = terms / (distributed.sum_over_ranks(weight, group) if distributed_ else weight)
    if distributed_ and grad_reduction == "ddp_mean":
        # DDP divides the summed gradients by the number of ranks afterwards
        terms = distributed.scale_gradient(terms, float(dist.get_world_size(group)))
    if reduction == "none":
        return terms
    loss = terms.sum()
    return distributed.report_sum(loss, group) if distributed_ else loss


def zero_of(logit_bias: Tensor | float | None, like: Tensor) -> Tensor:
    # a bias added to every logit cancels in the softmax; DDP still wants a gradient from it, of zeros
    if not isinstance(logit_bias, Tensor):
        return like.new_zeros(())
    return torch.where(torch.zeros_like(logit_bias, dtype=torch.bool), logit_bias, 0.0).sum().to(like.dtype)
