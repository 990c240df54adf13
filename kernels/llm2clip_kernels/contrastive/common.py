"""What every loss over pairs shares: its options, its reduction, and the conventions over a process group."""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from .. import distributed
from ..distributed import Group

Reduction = Literal["mean", "sum", "none"]
GradReduction = Literal["ddp_mean", "sum"]


def uses_group(group: Group, gather: bool | None) -> bool:
    """Whether other ranks' rows take part: as `gather` says, else exactly when a group is given."""
    return group is not None if gather is None else gather


def check_options(name: str, reduction: str, grad_reduction: str, label_smoothing: float = 0.0) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"{name}: reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    if grad_reduction not in ("ddp_mean", "sum"):
        raise ValueError(f"{name}: grad_reduction must be 'ddp_mean' or 'sum', got {grad_reduction!r}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"{name}: label_smoothing must lie in [0, 1], got {label_smoothing}")


def reduce_terms(
    terms: Tensor, total: int, reduction: str, grad_reduction: str, group: Group, distributed_: bool
) -> Tensor:
    if distributed_ and grad_reduction == "ddp_mean":
        # DDP divides the summed gradients by the number of ranks afterwards
        terms = distributed.scale_gradient(terms, float(dist.get_world_size(group)))
    if reduction == "none":
        return terms
    loss = terms.sum()
    if distributed_:
        loss = distributed.report_sum(loss, group)
    return loss / total if reduction == "mean" else loss


def zero_of(logit_bias: Tensor | float | None, like: Tensor) -> Tensor:
    # a bias added to every logit cancels in the softmax; DDP still wants a gradient from it, of zeros
    if not isinstance(logit_bias, Tensor):
        return like.new_zeros(())
    return torch.where(torch.zeros_like(logit_bias, dtype=torch.bool), logit_bias, 0.0).sum().to(like.dtype)
