"""One-direction InfoNCE with hard negatives (LLM2Vec's objective)."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from .. import distributed
from ..autocast import follows_autocast
from ..checks import check_groups, check_pair
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
    groups: Tensor | None = None,
    negative_groups: Tensor | None = None,
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
        negatives: (K, D) hard negatives, any number, or None. Ranks agree on whether there are any; over ranks
            one may hold none, (0, D).
        groups: (B,) integer ids of what x and its positives show, over all ranks one numbering. Positives and
            negatives of a query's own id are left out of its sum, but for its own positive. A negative id equals
            nothing.
        negative_groups: (K,) ids of the hard negatives; needs `groups`. None: they equal nothing.
        scale, reduction, group, gather, grad_reduction, method: as in `infonce_loss`.

    Returns:
        0-dim loss, the same on every rank, or (B,) for "none".

    Raises:
        TypeError, ValueError: inputs that do not fit.
    """
    name = "nll_loss"
    check_options(name, reduction, grad_reduction)
    check_pair(x, positives, name)
    if x.shape[0] != positives.shape[0]:
        raise ValueError(f"{name}: one positive per query, got {x.shape[0]} and {positives.shape[0]} rows")
    if negative_groups is not None and (groups is None or negatives is None):
        raise ValueError(f"{name}: negative_groups needs negatives, and groups, the ids of the queries")
    over_ranks = transport_of(group, gather, name, ring=False) == "gather"
    candidates, ids = [positives], [] if groups is None else [groups]
    if negatives is not None and not (over_ranks and negatives.shape == (0, x.shape[1])):
        check_pair(x, negatives, name)
    if negatives is not None:
        candidates.append(negatives)
        if groups is not None:
            none = groups.new_full(negatives.shape[:1], -1)
            ids.append(none if negative_groups is None else negative_groups)
    for own, rows in zip(ids, candidates, strict=False):
        check_groups(own, own, rows, rows, name)
    first, total = 0, x.shape[0]
    if over_ranks:
        counts = [distributed.row_counts(c.shape[0], group, x.device) for c in candidates]
        counts = [n for n in counts if sum(n) > 0]
        first, total = sum(counts[0][: dist.get_rank(group)]), sum(counts[0])
        candidates = [distributed.gather_rows(c, n, group) for c, n in zip(candidates, counts, strict=False)]
        ids = [
            distributed.gather_rows(i.to(torch.int64), n, group) for i, n in zip(ids, counts, strict=False)
        ]
    row, _, pos, low = similarity_lse_with_positives(
        x, torch.cat(candidates), scale, directions="rows", diagonal=first, method=method,
        x_groups=groups, y_groups=torch.cat(ids) if ids else None,
    )  # fmt: skip
    assert pos is not None
    terms = (row - pos) + (low[: x.shape[0]] - low[x.shape[0] :])
    return reduce_terms(terms, total, reduction, grad_reduction, group, over_ranks)
