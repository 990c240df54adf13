"""One-direction InfoNCE with hard negatives (LLM2Vec's objective)."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from .. import distributed
from ..autocast import follows_autocast
from ..checks import check_pair
from ..distributed import Group
from ..similarity_lse.op import Method, similarity_lse_with_positives
from .common import GradReduction, Reduction, check_options, reduce_terms, transport_of


@follows_autocast
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
    check_options("nll_loss", reduction, grad_reduction)
    check_pair(x, positives, "nll_loss")
    if x.shape[0] != positives.shape[0]:
        raise ValueError(f"nll_loss: one positive per query, got {x.shape[0]} and {positives.shape[0]} rows")
    if negatives is not None:
        check_pair(x, negatives, "nll_loss")
    over_ranks = transport_of(group, gather, "nll_loss", ring=False) == "gather"
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
    return reduce_terms(terms, total, reduction, grad_reduction, group, over_ranks)
