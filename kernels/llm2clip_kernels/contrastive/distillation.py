"""Contrastive learning from a teacher: `similarity_distill` as two losses, alone or over a process group.

With S the student's logits, T the teacher's and N the number of pairs over all ranks:

    contrastive_i = ½ [row_lse_i + col_lse_i] - S_ii
    distill_i     = ½ [row_lse_i - Σ_j softmax_j(T_i·) S_ij] + ½ [col_lse_i - Σ_j softmax_j(T_·i) S_ji]

Over a process group only y and q travel, q without a gradient; all-reduces of N floats complete what runs along
columns.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from .. import distributed
from ..autocast import follows_autocast
from ..checks import check_paired, scale_tensor
from ..distributed import Group
from ..similarity_distill import similarity_distill_with_rounding
from .common import GradReduction, Reduction, check_options, reduce_terms, transport_of


def distill_terms(
    x: Tensor,
    y: Tensor,
    scale: Tensor | float,
    p: Tensor,
    q: Tensor,
    teacher_scale: Tensor | float,
    *,
    group: Group = None,
    distributed_: bool = False,
) -> tuple[Tensor, Tensor, int]:
    """Per-pair losses of this rank, and the number of pairs over all ranks.

    Args:
        x, y: (B, D), row i of x belongs to row i of y.
        scale: multiplier of their dot products.
        p, q: (B, E), the teacher's features of the same pairs; no gradient.
        teacher_scale: multiplier of the teacher's dot products; no gradient.
        group: process group, used when `distributed_`; None is the default group.
        distributed_: whether rows of other ranks are negatives too.

    Returns:
        (B,) contrastive and (B,) distillation losses, fp32 (fp64 for fp64), whose backward makes the gradient of
        the sum over all ranks; N.
    """
    # before anything travels
    factor = scale_tensor(scale, x, "distill_loss")
    first, total = 0, x.shape[0]
    counts = [total]
    if distributed_:
        counts = distributed.row_counts(x.shape[0], group, x.device)
        y = distributed.gather_rows(y, counts, group)
        q = distributed.gather_rows(q.detach(), counts, group)
        first, total = sum(counts[: dist.get_rank(group)]), sum(counts)
    of, low = similarity_distill_with_rounding(x, y, factor, p, q, teacher_scale, diagonal=first)
    assert of.col_lse is not None and of.positives is not None and of.cross_col is not None
    assert low.col_lse is not None and low.positives is not None and low.cross_col is not None
    col, col_low, cross_col, cross_low = of.col_lse, low.col_lse, of.cross_col, low.cross_col
    if distributed_:
        assert of.teacher_col_lse is not None and low.teacher_col_lse is not None
        col, col_low = distributed.merge_columns(col, col_low, counts, group)
        cross_col, cross_low = distributed.merge_averages(
            cross_col, cross_low, of.teacher_col_lse, low.teacher_col_lse, counts, group
        )
    pos = of.positives
    # differences first: each of the four nearly cancels once the student has learned
    contrastive = 0.5 * ((of.row_lse - pos) + (col - pos)) + (0.5 * (low.row_lse + col_low) - low.positives)
    distill = 0.5 * ((of.row_lse - of.cross_row) + (col - cross_col))
    distill = distill + 0.5 * ((low.row_lse - low.cross_row) + (col_low - cross_low))
    return contrastive, distill, total


@follows_autocast
def distill_loss(
    x: Tensor,
    y: Tensor,
    scale: Tensor | float,
    p: Tensor,
    q: Tensor,
    teacher_scale: Tensor | float,
    *,
    reduction: Reduction = "mean",
    group: Group = None,
    gather: bool | None = None,
    grad_reduction: GradReduction = "ddp_mean",
) -> tuple[Tensor, Tensor]:
    """Symmetric InfoNCE, and the cross-entropy of the student's similarities against a teacher's.

    Both come from one sweep over the student's and the teacher's similarities, in O(B·(D+E)) memory: six matmuls
    forward and backward. Add them, weighted, before calling backward once.

    Args:
        x: (B, D), normalised by the caller; fp32, bf16, fp16 or fp64.
        y: (B, D), row i is the positive of x's row i; all other rows are negatives.
        scale: multiplier of the dot products (already exponentiated, not a temperature).
        p: (B, E), the teacher's features in place of x, normalised; any E, a dtype of its own. No gradient.
        q: (B, E), the teacher's features in place of y. No gradient.
        teacher_scale: multiplier of the teacher's dot products. No gradient.
        reduction: "mean" over all pairs of all ranks, "sum" over them, "none" for this rank's (B,) terms.
        group: process group whose ranks' rows are candidates too.
        gather: whether to use other ranks' rows; None: exactly when `group` is given. True with group None
            is the default group.
        grad_reduction: what happens to parameter gradients afterwards. "ddp_mean": averaged over the ranks as
            DDP does (inputs' gradients come multiplied by the number of ranks); "sum": summed.

    Returns:
        Contrastive and distillation loss, 0-dim and the same on every rank, or (B,) for "none"; fp32 (fp64 for
        fp64). The second is the mean of both directions, -Σ softmax(teacher)·log_softmax(student), as in
        open_clip's `DistillClipLoss`; its minimum is the teacher's entropy, not 0.

    Raises:
        TypeError, ValueError: inputs that do not fit.

    Examples:
        >>> contrastive, distill = distill_loss(image, text, scale, teacher_image, teacher_text, teacher_scale)
        >>> (contrastive + distill).backward()
    """
    check_options("distill_loss", reduction, grad_reduction)
    check_paired(x, y, "distill_loss")
    over_ranks = transport_of(group, gather, "distill_loss", ring=False) == "gather"
    # before anything travels: an error on one rank alone would leave the others waiting
    if q.shape[0] != y.shape[0]:
        raise ValueError(f"distill_loss: q must have y's rows, got {q.shape[0]} and {y.shape[0]}")
    contrastive, distill, total = distill_terms(
        x, y, scale, p, q, teacher_scale, group=group, distributed_=over_ranks
    )
    return (
        reduce_terms(contrastive, total, reduction, grad_reduction, group, over_ranks),
        reduce_terms(distill, total, reduction, grad_reduction, group, over_ranks),
    )
