"""SigLIP's loss: every pair is a yes-or-no question of its own, so no sum over the batch stands in the way."""

from __future__ import annotations

from typing import Literal

import torch.distributed as dist
from torch import Tensor

from .. import distributed
from ..autocast import follows_autocast
from ..checks import check_groups, check_pair
from ..distributed import Group
from ..sigmoid_loss.op import sigmoid_terms
from .common import GradReduction, Reduction, check_options, reduce_terms, transport_of
from .sigmoid_ring import ring_terms
from .statistics import Transport


def local_sigmoid_terms(
    x: Tensor,
    y: Tensor,
    scale: Tensor | float,
    bias: Tensor | float,
    *,
    x_groups: Tensor | None = None,
    y_groups: Tensor | None = None,
    rows: bool = False,
    weight: float = 1.0,
    group: Group = None,
    transport: Transport = "local",
) -> tuple[Tensor, int]:
    """This rank's rows of x against everybody's y.

    Args:
        x, y, scale, bias, x_groups, y_groups: as in `sigmoid_loss`.
        rows: losses per row instead of their sum.
        weight: factor of this rank's sum (not of rows); may differ between ranks.
        group: the ranks that take part.
        transport: "local" for none of them, "gather", or "ring": then the upstream gradient of the sum must be the
            same on every rank, since y's gradient travels, already added up, in the forward.

    Returns:
        () sum or (M,) losses of this rank's rows, with the gradient of the sum over all ranks' results; and the
        number of rows of x over all ranks.
    """
    if transport == "local":
        terms = sigmoid_terms(x, y, scale, bias, x_groups=x_groups, y_groups=y_groups, rows=rows)
        return terms if rows else terms * weight, x.shape[0]
    counts = distributed.row_counts(y.shape[0], group, y.device)
    total = sum(counts)
    if x_groups is not None:
        total = sum(distributed.row_counts(x.shape[0], group, x.device))
    if y_groups is not None:
        y_groups = distributed.gather_rows(y_groups, counts, group)
    if transport == "ring":
        terms = ring_terms(
            x, y, scale, bias, x_groups, y_groups, counts=counts, rows=rows, weight=weight, group=group
        )
        return terms, total
    candidates = distributed.gather_rows(y, counts, group)
    first = sum(counts[: dist.get_rank(group)])
    terms = sigmoid_terms(
        x, candidates, scale, bias, x_groups=x_groups, y_groups=y_groups, diagonal=first, rows=rows
    )
    return terms if rows else terms * weight, total


@follows_autocast
def sigmoid_loss(
    x: Tensor,
    y: Tensor,
    scale: Tensor | float,
    bias: Tensor | float,
    *,
    x_groups: Tensor | None = None,
    y_groups: Tensor | None = None,
    reduction: Reduction = "mean",
    group: Group = None,
    gather: bool | Literal["ring"] | None = None,
    grad_reduction: GradReduction = "ddp_mean",
) -> Tensor:
    """Sigmoid loss (SigLIP, arXiv 2303.15343) in O((M+N)·D) memory, value and gradients from one sweep.

    Σ_ij softplus(-z_ij (scale · x_i·y_j + bias)), z = 1 for positive pairs and -1 for the others.

    Args:
        x: (M, D), normalised by the caller; fp32, bf16, fp16 or fp64.
        y: (N, D), dtype of x.
        scale: multiplier of the dot products (already exponentiated).
        bias: added to every logit; SigLIP starts at -10. Scale and bias: a number, or a 0-dim or 1-element
            tensor, which then gets a gradient.
        x_groups, y_groups: (M,) and (N,) integers: pairs with equal ids are positive, any number per row; an id
            below 0 equals nothing. y_groups None: the ids of x, for M = N. Both None: row i of x belongs to row
            i of y, M = N, over ranks too.
        reduction: "mean": the sum over all pairs divided by the rows of x over all ranks, as in SigLIP; "sum";
            "none": (M,) sums of this rank's rows over everybody's y, at the cost of a fourth matmul.
        group: process group whose ranks' y are candidates too. Ranks may hold different numbers of rows; all
            must agree on which inputs need gradients.
        gather: whether to use other ranks' rows; None: exactly when `group` is given. "ring" passes the parts of y
            (and their gradients) from rank to rank while the one at hand is computed on, instead of gathering
            them: O(M·D) memory for any number of ranks. Its backward must start from the same upstream gradient
            on every rank.
        grad_reduction: what happens to parameter gradients afterwards. "ddp_mean": averaged over the ranks as
            DDP does (inputs' gradients come multiplied by the number of ranks); "sum": summed.

    Returns:
        0-dim loss, the same on every rank, or (M,) for "none"; fp32 (fp64 for fp64).

    Raises:
        TypeError, ValueError: inputs that do not fit.

    Examples:
        >>> loss = sigmoid_loss(image_features, text_features, logit_scale.exp(), logit_bias)
    """
    check_options("sigmoid_loss", reduction, grad_reduction)
    transport = transport_of(group, gather, "sigmoid_loss")
    check_pair(x, y, "sigmoid_loss")
    if x_groups is None and y_groups is not None:
        raise ValueError("sigmoid_loss: y_groups without x_groups; give the ids of both")
    paired = x_groups is None or y_groups is None
    if paired and x.shape[0] != y.shape[0]:
        wanted = "x_groups and y_groups" if x_groups is None else "y_groups too"
        raise ValueError(
            f"sigmoid_loss: x and y must pair up, got {x.shape[0]} and {y.shape[0]} rows; or give {wanted}"
        )
    y_groups = x_groups if y_groups is None else y_groups
    # before anything travels: an error on one rank would leave the others waiting
    check_groups(x_groups, y_groups, x, y, "sigmoid_loss")
    terms, total = local_sigmoid_terms(
        x, y, scale, bias, x_groups=x_groups, y_groups=y_groups, rows=reduction == "none",
        group=group, transport=transport,
    )  # fmt: skip
    return reduce_terms(terms, total, reduction, grad_reduction, group, transport != "local")
