"""Symmetric InfoNCE over `similarity_lse`: everything here is O(N·D) algebra on top of it.

With S = scale · x yᵀ, ε the label smoothing, and T_i the target of row i, a distribution over the columns
(its own pair; or spread evenly over its group):

    row_i = row_lse_i - (1-ε) Σ_j T_ij S_ij - ε mean_j S_ij          loss_i = ½ (row_i + col_i)

and the same for the columns with the transpose of S. Masked pairs are in no sum and no mean.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from .. import distributed
from ..autocast import follows_autocast
from ..checks import accumulator, check_groups, check_pair, scale_tensor
from ..distributed import Group
from ..similarity_lse.op import Method, is_small
from .common import (
    GradReduction,
    Reduction,
    check_options,
    check_weights,
    reduce_terms,
    transport_of,
    zero_of,
)
from .statistics import Statistics, Transport, pair_statistics

SameGroup = Literal["mask", "positive"]


def _mean_logits(
    x: Tensor, y: Tensor, scale: Tensor, known: Statistics, masked: bool, transport: Transport, group: Group
) -> tuple[Tensor, Tensor]:
    """Mean logit of every row and of every column over all that is not masked; (M,), (N,)."""
    wide_x, wide_y = x.to(known.row.dtype), y.to(known.row.dtype)
    sum_x, sum_y = wide_x.sum(0), wide_y.sum(0)
    if transport != "local":
        sum_x, sum_y = distributed.sum_over_ranks(sum_x, group), distributed.sum_over_ranks(sum_y, group)
    # products and sums rather than a matmul, which autocast would round
    by_row, by_column = scale * (wide_x * sum_y).sum(1), scale * (wide_y * sum_x).sum(1)
    if not masked:
        return by_row / known.columns, by_column / known.rows
    return (
        (by_row - known.row_group) / (known.columns - known.row_size),
        (by_column - known.col_group) / (known.rows - known.col_size),
    )


def _plain_terms(x: Tensor, y: Tensor, scale: Tensor, label_smoothing: float) -> Tensor:
    """(B,) terms of a batch so small that the matrix costs less than the algebra around the op."""
    wide = accumulator(x.dtype)
    logits = (x.to(wide) @ y.to(wide).T) * scale
    target = torch.arange(x.shape[0], device=x.device)
    by_row, by_column = (
        cross_entropy(side, target, reduction="none", label_smoothing=label_smoothing)
        for side in (logits, logits.T)
    )
    return 0.5 * (by_row + by_column)


def symmetric_terms(
    x: Tensor,
    y: Tensor,
    scale: Tensor | float,
    *,
    groups: Tensor | None = None,
    y_groups: Tensor | None = None,
    same_group: SameGroup = "mask",
    label_smoothing: float = 0.0,
    group: Group = None,
    distributed_: bool | Literal["ring"] = False,
    method: Method = "auto",
) -> tuple[Tensor, int]:
    """Per-pair losses of this rank, and the number of pairs over all ranks.

    Args:
        x, y: (B, D), row i of x belongs to row i of y.
        scale: multiplier of the dot products.
        groups, y_groups, same_group: as in `infonce_loss`.
        label_smoothing: share of the target spread evenly over all candidates that are not masked.
        group: process group, used when `distributed_`; None is the default group.
        distributed_: whether rows of other ranks are negatives too, gathered (True) or in a "ring".
        method: as in `similarity_lse`.

    Returns:
        (B,) fp32 (fp64 for fp64) losses whose backward makes the gradient of the sum over all ranks; N.
    """
    factor = scale_tensor(scale, x, "infonce_loss")
    if groups is None and not distributed_ and is_small(x, y, method):
        return _plain_terms(x, y, factor, label_smoothing), x.shape[0]
    transport: Transport = "ring" if distributed_ == "ring" else "gather" if distributed_ else "local"
    masked = groups is not None and same_group == "mask"
    spread = groups is not None and same_group == "positive"
    known = pair_statistics(
        x, y, factor, x_ids=groups, y_ids=groups if y_groups is None else y_groups, masked=masked,
        sums=spread or (masked and label_smoothing > 0.0), transport=transport, group=group, method=method,
    )  # fmt: skip
    pos, half_low = known.pos, 0.5 * (known.row_low + known.col_low) - known.pos_low
    # differences first: log-sum-exp and positive nearly cancel once the model has learned
    loss = 0.5 * ((known.row - pos) + (known.col - pos)) + half_low
    # what the rest of the group takes away from the own pair's share of the target
    row_gap, col_gap = torch.zeros_like(pos), torch.zeros_like(pos)
    if spread:
        row_gap = (known.row_size * pos - known.row_group) / (known.row_size + 1)
        col_gap = (known.col_size * pos - known.col_group) / (known.col_size + 1)
        loss = loss + 0.5 * (row_gap + col_gap)
    if label_smoothing > 0.0:
        by_row, by_column = _mean_logits(x, y, factor, known, masked, transport, group)
        aimed = 0.5 * ((pos - row_gap) + (pos - col_gap))
        loss = loss + label_smoothing * (aimed - 0.5 * (by_row + by_column))
    return loss, known.rows


def _set_terms(
    x: Tensor,
    y: Tensor,
    scale: Tensor | float,
    groups: Tensor,
    y_groups: Tensor,
    label_smoothing: float,
    group: Group,
    transport: Transport,
    method: Method,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Terms of the rows and of the columns, each with 1 where there is a positive and 0 elsewhere."""
    factor = scale_tensor(scale, x, "infonce_loss")
    known = pair_statistics(
        x, y, factor, paired=False, x_ids=groups, y_ids=y_groups, sums=True, transport=transport, group=group,
        method=method,
    )  # fmt: skip
    sides = (
        (known.row, known.row_low, known.row_group, known.row_size),
        (known.col, known.col_low, known.col_group, known.col_size),
    )
    means = (None, None)
    if label_smoothing > 0.0:
        means = _mean_logits(x, y, factor, known, False, transport, group)  # type: ignore[assignment]
    results = []
    for (lse, low, summed, size), mean in zip(sides, means, strict=True):
        positive = summed / size.clamp(min=1)
        term = (lse - positive) + low
        if mean is not None:
            term = term + label_smoothing * (positive - mean)
        results.append((torch.where(size > 0, term, 0.0), (size > 0).to(term.dtype)))
    return results[0], results[1]


@follows_autocast
def infonce_loss(
    x: Tensor,
    y: Tensor,
    scale: Tensor | float,
    *,
    groups: Tensor | None = None,
    y_groups: Tensor | None = None,
    same_group: SameGroup = "mask",
    weights: Tensor | None = None,
    y_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    logit_bias: Tensor | float | None = None,
    reduction: Reduction = "mean",
    group: Group = None,
    gather: bool | Literal["ring"] | None = None,
    grad_reduction: GradReduction = "ddp_mean",
    method: Method = "auto",
) -> Tensor:
    """Symmetric InfoNCE (CLIP's loss) in O(N·D) memory: the mean of both directions' cross-entropies.

    Args:
        x: (B, D), normalised by the caller; fp32, bf16, fp16 or fp64.
        y: (B, D), row i is the positive of x's row i; all other rows are negatives. (C, D) with
            `same_group="positive"` and `y_groups`.
        scale: multiplier of the dot products (already exponentiated, not a temperature).
        groups: (B,) integer ids of what the rows show, over all ranks one numbering. A negative id equals
            nothing. None: every pair for itself.
        y_groups: ids of the rows of y; None: those of x.
        same_group: what pairs of equal ids are. "mask": other than the own pair, no negatives, as if absent
            (false negatives). "positive": all positives; a row's target is spread evenly over its group
            (SupCon, UniCL). Together with `y_groups` x and y are two sets that need not pair up (M images, C
            captions): only ids make positives, rows and columns are averaged each for themselves, and a row
            without a positive is a negative for others and has no term of its own.
        weights: (B,) weight of every pair's term; for two sets, of every row of x.
        y_weights: (C,) weight of every row of y, for two sets only.
        label_smoothing: in [0, 1], share of the target spread evenly over all candidates that are not masked.
        logit_bias: accepted for compatibility; it cancels, and gets a zero gradient.
        reduction: "mean" over all pairs of all ranks (weighted: Σ wᵢ lossᵢ / Σ wᵢ), "sum" of wᵢ lossᵢ over
            them, "none" for this rank's (B,) terms wᵢ lossᵢ. Two sets: ½ of the two means, ½ of the two
            sums, or ½ of this rank's (B + C,) terms, those of x first.
        group: process group whose ranks' rows are negatives too.
        gather: whether to use other ranks' rows; None: exactly when `group` is given. True with group None
            is the default group. "ring": as True, but y travels from rank to rank, and no rank holds all of
            it: O(B·D) memory; `method` is then "recompute".
        grad_reduction: what happens to parameter gradients afterwards. "ddp_mean": averaged over the ranks as
            DDP does (inputs' gradients come multiplied by the number of ranks); "sum": summed.
        method: as in `similarity_lse`.

    Returns:
        0-dim loss, the same on every rank, or this rank's terms for "none"; fp32 (fp64 for fp64).

    Raises:
        TypeError, ValueError: inputs that do not fit.
    """
    name = "infonce_loss"
    check_options(name, reduction, grad_reduction, label_smoothing)
    check_pair(x, y, name)
    transport = transport_of(group, gather, name)
    if same_group not in ("mask", "positive"):
        raise ValueError(f"{name}: same_group must be 'mask' or 'positive', got {same_group!r}")
    if groups is None and y_groups is not None:
        raise ValueError(f"{name}: y_groups needs groups, the ids of the rows of x")
    two_sets = y_groups is not None and same_group == "positive"
    if not two_sets and x.shape[0] != y.shape[0]:
        raise ValueError(
            f"{name}: x and y must pair up, got {x.shape[0]} and {y.shape[0]} rows; sets of different sizes "
            "need groups, y_groups and same_group='positive'"
        )
    if y_weights is not None and not two_sets:
        raise ValueError(
            f"{name}: y_weights are for two sets (y_groups with same_group='positive'); use weights"
        )
    x_weights = check_weights(weights, x, "weights", name)
    column_weights = check_weights(y_weights, y, "y_weights", name)
    spread = transport != "local"
    if groups is not None:
        groups, y_groups = check_groups(groups, groups if y_groups is None else y_groups, x, y, name)
    if two_sets:
        assert groups is not None and y_groups is not None
        sides = _set_terms(x, y, scale, groups, y_groups, label_smoothing, group, transport, method)
        parts = [
            0.5 * reduce_terms(terms, 0, reduction, grad_reduction, group, spread, weight)
            for terms, weight in zip(
                (side[0] for side in sides),
                (
                    valid if given is None else valid * given
                    for (_, valid), given in zip(sides, (x_weights, column_weights), strict=True)
                ),
                strict=True,
            )
        ]
        loss = torch.cat(parts) if reduction == "none" else parts[0] + parts[1]
    else:
        terms, total = symmetric_terms(
            x, y, scale, groups=groups, y_groups=y_groups, same_group=same_group,
            label_smoothing=label_smoothing, group=group, method=method,
            distributed_="ring" if transport == "ring" else spread,
        )  # fmt: skip
        loss = reduce_terms(terms, total, reduction, grad_reduction, group, spread, x_weights)
    return loss if logit_bias is None else loss + zero_of(logit_bias, loss)
