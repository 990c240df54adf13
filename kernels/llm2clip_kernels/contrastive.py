"""Contrastive losses over `similarity_lse`: everything here is O(N·D) algebra on top of it.

With S = scale · x yᵀ, ε the label smoothing and N the number of pairs over all ranks:

    loss_i = ½ [row_lse_i + col_lse_i] - (1-ε) S_ii - ε/(2N) [Σ_j S_ij + Σ_j S_ji]

Over a process group only y travels (all-gather; its gradient comes back by one reduce-scatter): rank r owns
the (B_r, N) block of S, whose rows are complete; all-reduces of N floats complete the column sums.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from . import distributed
from .checks import check_pair, scale_tensor
from .distributed import Group
from .similarity_lse.op import Method, similarity_lse_with_positives

Reduction = Literal["mean", "sum", "none"]
GradReduction = Literal["ddp_mean", "sum"]


def _check_options(name: str, reduction: str, grad_reduction: str, label_smoothing: float = 0.0) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"{name}: reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    if grad_reduction not in ("ddp_mean", "sum"):
        raise ValueError(f"{name}: grad_reduction must be 'ddp_mean' or 'sum', got {grad_reduction!r}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"{name}: label_smoothing must lie in [0, 1], got {label_smoothing}")


def symmetric_terms(
    x: Tensor,
    y: Tensor,
    scale: Tensor | float,
    *,
    label_smoothing: float = 0.0,
    group: Group = None,
    distributed_: bool = False,
    method: Method = "auto",
) -> tuple[Tensor, int]:
    """Per-pair losses of this rank, and the number of pairs over all ranks.

    Args:
        x, y: (B, D), row i of x belongs to row i of y.
        scale: multiplier of the dot products.
        label_smoothing: share of the target spread evenly over all N candidates.
        group: process group, used when `distributed_`; None is the default group.
        distributed_: whether rows of other ranks are negatives too.
        method: as in `similarity_lse`.

    Returns:
        (B,) fp32 (fp64 for fp64) losses whose backward makes the gradient of the sum over all ranks; N.
    """
    factor = scale_tensor(scale, x, "infonce_loss")
    if distributed_:
        counts = distributed.row_counts(x.shape[0], group, x.device)
        candidates = distributed.gather_rows(y, counts, group)
        first = sum(counts[: dist.get_rank(group)])
        total = sum(counts)
    else:
        candidates, first, total = y, 0, x.shape[0]
    row, col, pos, low = similarity_lse_with_positives(x, candidates, factor, diagonal=first, method=method)
    assert col is not None and pos is not None
    if distributed_:
        col = distributed.merge_columns(col, counts, group)
    rows = x.shape[0]
    # differences first: log-sum-exp and positive nearly cancel once the model has learned
    loss = 0.5 * ((row - pos) + (col - pos))
    loss = loss + (0.5 * low[:rows] - low[rows + candidates.shape[0] :])
    if not distributed_:
        loss = loss + 0.5 * low[rows : 2 * rows]
    if label_smoothing > 0.0:
        loss = loss + label_smoothing * pos
        wide_x, wide_y = x.to(row.dtype), y.to(row.dtype)
        sum_x, sum_y = wide_x.sum(0), candidates.to(row.dtype).sum(0)
        if distributed_:
            sum_x = distributed.sum_over_ranks(sum_x, group)
        all_logits = factor * (wide_x @ sum_y + wide_y @ sum_x)
        loss = loss - label_smoothing / (2 * total) * all_logits
    return loss, total


def _reduce(
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


def infonce_loss(
    x: Tensor,
    y: Tensor,
    scale: Tensor | float,
    *,
    label_smoothing: float = 0.0,
    logit_bias: Tensor | float | None = None,
    reduction: Reduction = "mean",
    group: Group = None,
    gather: bool | None = None,
    grad_reduction: GradReduction = "ddp_mean",
    method: Method = "auto",
) -> Tensor:
    """Symmetric InfoNCE (CLIP's loss) in O(N·D) memory: the mean of both directions' cross-entropies.

    Args:
        x: (B, D), normalised by the caller; fp32, bf16, fp16 or fp64.
        y: (B, D), row i is the positive of x's row i; all other rows are negatives.
        scale: multiplier of the dot products (already exponentiated, not a temperature).
        label_smoothing: in [0, 1], spread evenly over all candidates.
        logit_bias: accepted for compatibility; it cancels, and gets a zero gradient.
        reduction: "mean" over all pairs of all ranks, "sum" over them, "none" for this rank's (B,) terms.
        group: process group whose ranks' rows are negatives too.
        gather: whether to use other ranks' rows; None: exactly when `group` is given. True with group None
            is the default group.
        grad_reduction: what happens to parameter gradients afterwards. "ddp_mean": averaged over the ranks as
            DDP does (inputs' gradients come multiplied by the number of ranks); "sum": summed.
        method: as in `similarity_lse`.

    Returns:
        0-dim loss, the same on every rank, or (B,) for "none"; fp32 (fp64 for fp64).

    Raises:
        TypeError, ValueError: inputs that do not fit.
    """
    _check_options("infonce_loss", reduction, grad_reduction, label_smoothing)
    check_pair(x, y, "infonce_loss")
    if x.shape[0] != y.shape[0]:
        raise ValueError(f"infonce_loss: x and y must pair up, got {x.shape[0]} and {y.shape[0]} rows")
    over_ranks = group is not None if gather is None else gather
    terms, total = symmetric_terms(
        x, y, scale, label_smoothing=label_smoothing, group=group, distributed_=over_ranks, method=method
    )
    loss = _reduce(terms, total, reduction, grad_reduction, group, over_ranks)
    return loss + zero_of(logit_bias, loss)


def nll_loss(
    x: Tensor,
    positives: Tensor,
    negatives: Tensor | None,
    scale: Tensor | float,
    *,
    reduction: Reduction = "mean",
    group: Group = None,
    gather: bool | None = None,
    grad_reduction: GradReduction = "ddp_mean",
    method: Method = "auto",
) -> Tensor:
    """One-direction InfoNCE: every row of x against [positives; negatives] of all ranks.

    Args:
        x: (B, D) queries, normalised by the caller.
        positives: (B, D), row i belongs to x's row i; the other rows are in-batch negatives.
        negatives: (K, D) hard negatives, any number, or None.
        scale, reduction, group, gather, grad_reduction, method: as in `infonce_loss`.

    Returns:
        0-dim loss, the same on every rank, or (B,) for "none".

    Raises:
        TypeError, ValueError: inputs that do not fit.
    """
    _check_options("nll_loss", reduction, grad_reduction)
    check_pair(x, positives, "nll_loss")
    if x.shape[0] != positives.shape[0]:
        raise ValueError(f"nll_loss: one positive per query, got {x.shape[0]} and {positives.shape[0]} rows")
    if negatives is not None:
        check_pair(x, negatives, "nll_loss")
    over_ranks = group is not None if gather is None else gather
    first, total = 0, x.shape[0]
    candidates = [positives] if negatives is None else [positives, negatives]
    if over_ranks:
        counts = distributed.row_counts(x.shape[0], group, x.device)
        first, total = sum(counts[: dist.get_rank(group)]), sum(counts)
        candidates = [
            distributed.gather_rows(c, distributed.row_counts(c.shape[0], group, x.device), group)
            for c in candidates
        ]
    row, _, pos, low = similarity_lse_with_positives(
        x, torch.cat(candidates), scale, directions="rows", diagonal=first, method=method
    )
    assert pos is not None
    terms = (row - pos) + (low[: x.shape[0]] - low[x.shape[0] :])
    return _reduce(terms, total, reduction, grad_reduction, group, over_ranks)
