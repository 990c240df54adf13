"""Losses between a student's features and a teacher's of the same images or captions, over all ranks.

`structure` compares all similarities within the batch: with Gram matrices S Sᵀ and T Tᵀ of N unit-norm rows,

    ‖S Sᵀ - T Tᵀ‖² / N² = (‖Sᵀ S‖² - 2 ‖Sᵀ T‖² + ‖Tᵀ T‖²) / N²

so that only matrices of the features' dimensions are made, and added up over the ranks.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from llm2clip_kernels import distributed
from llm2clip_kernels.contrastive.common import reduce_terms
from llm2clip_kernels.distributed import Group


def feature_loss(
    student: Tensor, teacher: Tensor, weights: Mapping[str, float], group: Group = None
) -> Tensor:
    """Weighted sum of the losses named in `weights`.

    Args:
        student: (B, D), unit norm.
        teacher: (B, E), unit norm, row i of the same image or caption; no gradient. E = D but for `structure`.
        weights: of `mse` (mean squared distance), `cosine` (1 - cosine) and `structure` (above; the counterpart of
            ProCLIP's structure loss, arXiv 2510.18795).
        group: the ranks that share the batch; None: this process alone.

    Returns:
        0-dim, the same on every rank; gradients are right after DDP's averaging over the ranks.
    """
    teacher = teacher.detach().to(student.dtype)
    total = student.new_zeros(())
    for name, weight in weights.items():
        if weight:
            value = (
                _structure(student, teacher, group)
                if name == "structure"
                else _rows(name, student, teacher, group)
            )
            total = total + weight * value
    return total


def mean_over_ranks(terms: Tensor, group: Group = None) -> Tensor:
    """Mean of (B,) terms over the rows of all ranks, which may hold different numbers; gradients for DDP."""
    rows = len(terms)
    if group is not None:
        rows = sum(distributed.row_counts(rows, group, terms.device))
    return reduce_terms(terms, rows, "mean", "ddp_mean", group, group is not None)


def _rows(name: str, student: Tensor, teacher: Tensor, group: Group) -> Tensor:
    if name == "mse":
        return mean_over_ranks((student - teacher).square().sum(-1), group)
    return mean_over_ranks(1.0 - (student * teacher).sum(-1), group)


def _structure(student: Tensor, teacher: Tensor, group: Group) -> Tensor:
    with torch.autocast(student.device.type, enabled=False):
        products = [student.T @ student, student.T @ teacher, teacher.T @ teacher]
    rows = len(student)
    if group is not None:
        # every rank has the whole loss; what it gives to another's rows comes back through the sum
        products = [distributed.sum_over_ranks(product, group) for product in products]
        rows = sum(distributed.row_counts(rows, group, student.device))
    own, mixed, fixed = (product.square().sum() for product in products)
    # rounding may leave a little less than nothing
    return (own - 2.0 * mixed + fixed).clamp(min=0.0) / rows**2
