"""`similarity_rank`: where the right answers of rows and columns stand, from one pass over x yᵀ.

With S = x yᵀ (M, N), never stored, and s_i the score of row i's best right answer:

    above_i = #{j : S_ij > s_i}          tied_i = #{j : S_ij = s_i}

and the same for columns, from the same products. Scores are compared exactly: fp32 products (fp64 for fp64) decide
all pairs but those within their proven rounding error of the threshold; those few are scored again in fp64. Two
scores are equal when they differ by no more than `tolerance` and fp64's own rounding, (D + 8)·2⁻⁵²·‖x_i‖·‖y_j‖, so
equal features tie wherever a GEMM's tiles end.

Two ops, so that a process group can complete the columns' thresholds in between: the best right answers, and the
counts around them. Neither has gradients.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from .. import backend, distributed
from ..autocast import follows_autocast
from ..checks import check_groups, check_pair
from ..distributed import Group
from . import chunked
from .pairs import pair_scores, positive_pairs

Ties = Literal["pessimistic", "optimistic"]

# rows and columns of a CPU tile of fp32 dot products
_CPU_TILE = 1024


@torch.library.custom_op("llm2clip_kernels::similarity_rank_best", mutates_args=())
def _best(x: Tensor, y: Tensor, x_groups: Tensor, y_groups: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, y = x.contiguous(), y.contiguous()
    m, n = x.shape[0], y.shape[0]
    if y_groups.numel() == 0 and x.device.type == "cpu" and int(x_groups.max()) >= n:
        raise ValueError(f"similarity_rank: target {int(x_groups.max())} is no column, y has {n} rows")
    best = [torch.full((k,), -torch.inf, dtype=torch.float64, device=x.device) for k in (m, n)]
    scored, right = ([torch.zeros(k, dtype=torch.int64, device=x.device) for k in (m, n)] for _ in range(2))
    for rows, cols, meant in positive_pairs(x_groups, y_groups):
        scores = pair_scores(x, y, rows, cols)
        valid = meant & scores.isnan().logical_not()
        scores = torch.where(valid, scores, torch.full_like(scores, -torch.inf))
        for side, place in enumerate((rows, cols)):
            best[side].scatter_reduce_(0, place, scores, "amax")
            scored[side].index_add_(0, place, valid.long())
            right[side].index_add_(0, place, meant.long())
    # NaN: no right answer, or none with a score
    best = [b.masked_fill(s == 0, torch.nan) for b, s in zip(best, scored, strict=True)]
    return best[0], right[0], best[1], right[1]


@_best.register_fake
def _(x: Tensor, y: Tensor, x_groups: Tensor, y_groups: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    m, n = x.shape[0], y.shape[0]
    return (
        x.new_empty(m, dtype=torch.float64),
        x.new_empty(m, dtype=torch.int64),
        x.new_empty(n, dtype=torch.float64),
        x.new_empty(n, dtype=torch.int64),
    )


@torch.library.custom_op("llm2clip_kernels::similarity_rank_count", mutates_args=())
def _count(
    x: Tensor,
    y: Tensor,
    x_groups: Tensor,
    y_groups: Tensor,
    row_best: Tensor,
    col_best: Tensor,
    tolerance: float,
) -> tuple[Tensor, Tensor]:
    x, y = x.contiguous(), y.contiguous()
    columns = col_best.numel() > 0
    chosen = backend.choose_retrieval(x.device, x.dtype)
    if chosen == "native":
        rows, cols = torch.ops.llm2clip_native.similarity_rank_count(
            x.float(), y.float(), row_best, col_best, tolerance, _CPU_TILE
        )
    else:
        implementation: Any = chunked
        if chosen == "triton":
            from . import kernel

            implementation = kernel
        rows, cols = implementation.count(x, y, row_best, col_best, tolerance)
    tied = [x_groups.new_zeros(x.shape[0]), x_groups.new_zeros(y.shape[0])]
    x_norm, y_norm = chunked.norms(x), chunked.norms(y)
    for i, j, meant in positive_pairs(x_groups, y_groups):
        scores = pair_scores(x, y, i, j)
        margin = chunked.margins(tolerance, x_norm[i] * y_norm[j], x.shape[1])
        for side, (place, best) in enumerate(((i, row_best), (j, col_best))):
            if best.numel():
                tied[side].index_add_(0, place, (meant & (scores >= best[place] - margin)).long())
    # the counts hold right answers too; a right answer is never above the best one
    rows = torch.stack([rows[0], (rows[1] - tied[0]).clamp_min(0), tied[0]])
    if columns:
        cols = torch.stack([cols[0], (cols[1] - tied[1]).clamp_min(0), tied[1]])
    return rows, cols if columns else rows.new_empty(3, 0)


@_count.register_fake
def _(
    x: Tensor,
    y: Tensor,
    x_groups: Tensor,
    y_groups: Tensor,
    row_best: Tensor,
    col_best: Tensor,
    tolerance: float,
) -> tuple[Tensor, Tensor]:
    return (
        x.new_empty(3, x.shape[0], dtype=torch.int64),
        x.new_empty(3, col_best.shape[0], dtype=torch.int64),
    )


@dataclass(frozen=True)
class RankCounts:
    """What stands before and beside the best right answer of every query; each (Q,) int64.

    Attributes:
        above: wrong answers with a higher score.
        tied: wrong answers with the same score.
        tied_right: right answers with the same score, itself included.
        right: right answers at all; queries without any have zeros everywhere.
        candidates: size of what was ranked.
    """

    above: Tensor
    tied: Tensor
    tied_right: Tensor
    right: Tensor
    candidates: int

    def rank(self, ties: Ties = "pessimistic") -> Tensor:
        """Rank from 1 of the best right answer, 0 where there is none: (Q,) int64.

        Args:
            ties: "pessimistic": a wrong answer with an equal score counts as better; "optimistic": as worse.
        """
        better = self.above + self.tied if ties == "pessimistic" else self.above
        return torch.where(self.right > 0, better + 1, torch.zeros_like(better))

    def accuracy(self) -> Tensor:
        """Probability that a right answer comes first when ties are broken at random: (Q,) fp32.

        Features that tell nothing apart score chance. 0 where there is no right answer, or none with a score.
        """
        places = (self.tied + self.tied_right).clamp_min(1)
        hit = self.tied_right.float() / places.float()
        return torch.where(self.above == 0, hit, torch.zeros_like(hit))


def _right_answers(
    x: Tensor, y: Tensor, target: Tensor | None, x_groups: Tensor | None, y_groups: Tensor | None
) -> tuple[Tensor | None, Tensor]:
    """Ids of the rows and of the columns, checked: (targets, empty), (groups, groups), or (None, empty)."""
    of_x, of_y = check_groups(x_groups, y_groups, x, y, "similarity_rank")
    if target is None:
        return (of_x if of_x.numel() else None), of_y
    if of_x.numel():
        raise ValueError("similarity_rank: give target or groups, not both")
    if not isinstance(target, Tensor) or target.dtype not in (torch.int64, torch.int32):
        kind = target.dtype if isinstance(target, Tensor) else type(target).__name__
        raise TypeError(f"similarity_rank: target must be an int64 tensor, got {kind}")
    if target.shape != x.shape[:1]:
        raise ValueError(
            f"similarity_rank: target must have shape ({x.shape[0]},), got {tuple(target.shape)}"
        )
    if target.device != x.device:
        raise ValueError(f"similarity_rank: target must be on {x.device}, got {target.device}")
    return target.long().contiguous(), of_y


def _finish(counts: Tensor, best: Tensor, right: Tensor, candidates: int) -> RankCounts:
    # a right answer whose score is NaN stands behind everything
    lost = (right > 0) & best.isnan()
    above = torch.where(lost, candidates - right, counts[0])
    return RankCounts(above, counts[1], counts[2], right, candidates)


@follows_autocast
def similarity_rank_counts(
    x: Tensor,
    y: Tensor,
    target: Tensor | None = None,
    *,
    x_groups: Tensor | None = None,
    y_groups: Tensor | None = None,
    tolerance: float = 0.0,
    directions: Literal["both", "rows"] = "both",
    group: Group = None,
    gather: bool | None = None,
) -> tuple[RankCounts, RankCounts | None]:
    """What `similarity_rank` is made of: counts of better and equal answers, ties kept apart.

    Args and errors as in `similarity_rank`.

    Returns:
        Counts of the rows, and of the columns (None for directions="rows").
    """
    check_pair(x, y, "similarity_rank")
    if directions not in ("both", "rows"):
        raise ValueError(f"similarity_rank: directions must be 'both' or 'rows', got {directions!r}")
    if not 0.0 <= tolerance < float("inf"):
        raise ValueError(f"similarity_rank: tolerance must be a number >= 0, got {tolerance}")
    over_ranks = group is not None if gather is None else gather
    of_x, of_y = _right_answers(x, y, target, x_groups, y_groups)
    x, y = x.detach(), y.detach()
    if of_x is None and (x.shape[0] > y.shape[0] or (over_ranks and x.shape[0] != y.shape[0])):
        raise ValueError(
            f"similarity_rank: row i's right answer is column i, but x has {x.shape[0]} rows and y "
            f"{y.shape[0]}; give target or groups"
        )
    own, first = y.shape[0], 0
    if over_ranks:
        counts = distributed.row_counts(own, group, y.device)
        first = sum(counts[: dist.get_rank(group)])
        y = distributed.gather_rows(y, counts, group)
        of_y = distributed.gather_rows(of_y, counts, group) if of_y.numel() else of_y
    if of_x is None:
        of_x = torch.arange(first, first + x.shape[0], device=x.device)
    row_best, row_right, col_best, col_right = _best(x, y, of_x, of_y)
    columns = directions == "both"
    rows_total = x.shape[0]
    if over_ranks and columns:
        _complete_best(col_best, col_right, group)
    rows, cols = _count(
        x, y, of_x, of_y, row_best, col_best if columns else col_best.new_empty(0), float(tolerance)
    )
    of_rows = _finish(rows, row_best, row_right, y.shape[0])
    if not columns:
        return of_rows, None
    if over_ranks:
        total = torch.tensor([rows_total], device=x.device)
        dist.all_reduce(total, group=group)
        rows_total = int(total)
        dist.all_reduce(cols, group=group)
    mine = slice(first, first + own)
    return of_rows, _finish(cols[:, mine], col_best[mine], col_right[mine], rows_total)


def _complete_best(best: Tensor, right: Tensor, group: Group) -> None:
    """The columns' best right answers over all ranks' rows, in place."""
    scored = best.isnan().logical_not().long()
    best.nan_to_num_(-torch.inf, torch.inf, -torch.inf)
    dist.all_reduce(best, op=dist.ReduceOp.MAX, group=group)
    dist.all_reduce(scored, group=group)
    dist.all_reduce(right, group=group)
    best.masked_fill_(scored == 0, torch.nan)


@follows_autocast
def similarity_rank(
    x: Tensor,
    y: Tensor,
    target: Tensor | None = None,
    *,
    x_groups: Tensor | None = None,
    y_groups: Tensor | None = None,
    ties: Ties = "pessimistic",
    tolerance: float = 0.0,
    group: Group = None,
    gather: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """Rank of every row's right answer among all columns, and of every column's among all rows.

    One pass over the products x yᵀ for both, O(M + N) memory besides a bounded workspace, exact: the result is
    that of fp64 scores, whatever the dtype, tiles or threads. No gradients: inputs are detached.

    Args:
        x: (M, D) fp32, bf16, fp16 or fp64, any norm; ranks are by dot product.
        y: (N, D), dtype and device of x.
        target: (M,) int64, the column of each row's right answer, below 0 for none; None: row i's is column i.
            Several rows may share a column: its rank is that of the best of them.
        x_groups: (M,) int64, and
        y_groups: (N,) int64: all pairs of equal ids >= 0 are right answers, and the best one counts.
        ties: a wrong answer with an equal score counts as better ("pessimistic": features that tell nothing
            apart rank last, never first) or as worse ("optimistic"). Right answers never count against each
            other. Between the two: `similarity_rank_counts`.
        tolerance: scores that differ by no more are equal, besides fp64's own rounding.
        group: process group; y's rows of all ranks are candidates, and x's rows of all ranks rank its columns.
            `target` then counts over all ranks' columns.
        gather: whether to use other ranks' rows; None: exactly when `group` is given. True with group None is
            the default group.

    Returns:
        row_rank (M,) and col_rank (N,) int64, from 1; 0 where there is no right answer. With a process group: of
        this rank's rows and of this rank's own columns. A right answer whose score is NaN ranks last; a wrong
        one with NaN is never better.

    Raises:
        TypeError, ValueError: inputs that do not fit.

    Examples:
        >>> image_to_text, text_to_image = similarity_rank(image_features, text_features)
        >>> retrieval_metrics(image_to_text)["recall"][1]
    """
    if ties not in ("pessimistic", "optimistic"):
        raise ValueError(f"similarity_rank: ties must be 'pessimistic' or 'optimistic', got {ties!r}")
    rows, cols = similarity_rank_counts(
        x, y, target, x_groups=x_groups, y_groups=y_groups, tolerance=tolerance, group=group, gather=gather
    )
    assert cols is not None
    return rows.rank(ties), cols.rank(ties)


__all__ = ["RankCounts", "Ties", "similarity_rank", "similarity_rank_counts"]
