"""Symmetric InfoNCE over `similarity_lse`: everything here is O(N·D) algebra on top of it.

With S = scale · x yᵀ, ε the label smoothing and N the number of pairs over all ranks:

    loss_i = ½ [row_lse_i + col_lse_i] - (1-ε) S_ii - ε/(2N) [Σ_j S_ij + Σ_j S_ji]

Over a process group only y travels (all-gather; its gradient comes back by one reduce-scatter): rank r owns
the (B_r, N) block of S, whose rows are complete; all-reduces of N floats complete the column sums.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from .. import distributed
from ..checks import check_pair, scale_tensor
from ..distributed import Group
from ..similarity_lse.op import Method, similarity_lse_with_positives
from .common import GradReduction, Reduction, check_options, reduce_terms, uses_group, zero_of


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
    check_options("infonce_loss", reduction, grad_reduction, label_smoothing)
    check_pair(x, y, "infonce_loss")
    if x.shape[0] != y.shape[0]:
        raise ValueError(f"infonce_loss: x and y must pair up, got {x.shape[0]} and {y.shape[0]} rows")
    over_ranks = uses_group(group, gather)
    terms, total = symmetric_terms(
        x, y, scale, label_smoothing=label_smoothing, group=group, distributed_=over_ranks, method=method
    )
    loss = reduce_terms(terms, total, reduction, grad_reduction, group, over_ranks)
    return loss + zero_of(logit_bias, loss)
