"""sentence-transformers' ranking objective, every variant of it, without a score matrix.

With q_i, its positive p_i, hard negatives n_ik and C = [p; n_·1; ...; n_·K], row i's score sets are

    query_to_doc    s·<q_i, C_j>              query_to_query   s·<q_i, q_j>, j ≠ i
    doc_to_query    s·<p_i, q_j>              doc_to_doc       s·<p_i, C_j>, C_j of another query

    joint: log Σ exp over all chosen sets - s·<q_i, p_i>
    per_direction: the mean over the sets of log Σ exp over each - s·<q_i, p_i>

query_to_doc and doc_to_query are the rows and columns of one matrix and share one pass. What a set leaves out is
said with group ids. Hardness adds α·<q_i, C_j>, held constant, to the logits of some negatives: as if their scale
were s + α, but for gradients of the rows, which are those times s / (s + α).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from .. import distributed
from ..autocast import follows_autocast
from ..checks import check_pair, scale_tensor
from ..distributed import Group
from ..similarity_lse.op import Method, similarity_lse_with_positives
from .common import GradReduction, Reduction, check_options, reduce_terms, transport_of

Direction = Literal["query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"]
PartitionMode = Literal["joint", "per_direction"]
HardnessMode = Literal["in_batch_negatives", "hard_negatives", "all_negatives"]

_DIRECTIONS = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
_HARDNESS = (None, "in_batch_negatives", "hard_negatives", "all_negatives")


class _Scores:
    """One call's tensors: this rank's rows, everybody's candidates, and whose they are."""

    def __init__(
        self,
        queries: Tensor,
        docs: Tensor,
        negatives: Sequence[Tensor],
        scale: Tensor,
        group: Group,
        spread: bool,
        method: Method,
    ) -> None:
        self.q, self.p, self.own_negatives = queries, docs, list(negatives)
        self.scale, self.group, self.spread, self.method = scale, group, spread, method
        self.counts = [queries.shape[0]]
        self.first = 0
        if spread:
            self.counts = distributed.row_counts(queries.shape[0], group, queries.device)
            self.first = sum(self.counts[: dist.get_rank(group)])
        self.total = sum(self.counts)
        self.columns = [self.everybody(column) for column in (docs, *negatives)]
        self.every_doc = torch.cat(self.columns) if negatives else self.columns[0]
        everyone = torch.arange(self.total, device=queries.device)
        self.everyone = everyone
        self.ids = everyone[self.first : self.first + queries.shape[0]]
        self.doc_ids = everyone.repeat(len(self.columns))

    def everybody(self, rows: Tensor) -> Tensor:
        return distributed.gather_rows(rows, self.counts, self.group) if self.spread else rows

    def dots(self, rows: Tensor) -> Tensor:
        """<q_i, rows_i>, (B,) in the accumulator's dtype."""
        return (self.q.to(self.scale.dtype) * rows.to(self.scale.dtype)).sum(1)

    def rows(self, x: Tensor, y: Tensor, scale: Tensor, y_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Log-sum-exp of every row over the columns of other ids, and what rounding took from it."""
        lse, _, _, low = similarity_lse_with_positives(
            x, y, scale, directions="rows", method=self.method, x_groups=self.ids, y_groups=y_ids
        )
        return lse, low

    def both(self, y_ids: Tensor | None, columns: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """query_to_doc and, for `columns`, doc_to_query, less the positive; the positive; its rounding.

        Documents of `y_ids` equal to a row's id are left out of that row, but for its own positive.
        """
        row, col, pos, low = similarity_lse_with_positives(
            self.q, self.every_doc, self.scale, directions="both" if columns else "rows", diagonal=self.first,
            method=self.method, x_groups=None if y_ids is None else self.ids, y_groups=y_ids,
        )  # fmt: skip
        assert pos is not None
        b = row.shape[0]
        pos_low = low[-b:]
        doc_to_query = None if col is None else self._columns(col, low[b:], pos, pos_low)
        return (row - pos) + (low[:b] - pos_low), pos, pos_low, doc_to_query

    def columns_only(self) -> tuple[Tensor, Tensor, Tensor]:
        """doc_to_query less the positive; the positive; its rounding."""
        _, col, pos, low = similarity_lse_with_positives(
            self.q, self.columns[0], self.scale, diagonal=self.first, method=self.method
        )
        assert col is not None and pos is not None
        b = pos.shape[0]
        return self._columns(col, low[b:], pos, low[-b:]), pos, low[-b:]

    def _columns(self, col: Tensor, low: Tensor, pos: Tensor, pos_low: Tensor) -> Tensor:
        col, low = col[: self.total], low[: self.total]
        if self.spread:
            col, low = distributed.merge_columns(col, low, self.counts, self.group)
        return (col - pos) + (low - pos_low)


def _hardened(
    scores: _Scores, mode: HardnessMode, strength: float, doc_to_query: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """As `_Scores.both`, with α·<q_i, C_j> added to the logits of the negatives that `mode` names."""
    own = [scores.dots(rows) for rows in scores.own_negatives]
    if mode == "hard_negatives":
        # all but the own hard negatives as they are
        ids = torch.where(
            torch.arange(scores.doc_ids.shape[0], device=scores.ids.device) < scores.total, -1, scores.doc_ids
        )
        rest, pos, pos_low, columns = scores.both(ids, doc_to_query)
        logits = [dot * scores.scale + strength * dot.detach() for dot in own]
    else:
        columns = None
        if doc_to_query:
            columns, pos, pos_low = scores.columns_only()
        else:
            pos = scores.dots(scores.p) * scores.scale
            pos_low = torch.zeros_like(pos)
        harder = scores.scale + strength
        share = (scores.scale / harder).detach()
        x = distributed.scale_gradient(scores.q, share)
        y = distributed.scale_gradient(scores.every_doc, share)
        ids = scores.doc_ids
        if mode == "all_negatives":
            ids = torch.where(
                torch.arange(ids.shape[0], device=ids.device) < scores.total, ids, torch.full_like(ids, -1)
            )
        lse, low = scores.rows(x, y, harder, ids)
        rest = (lse - pos) + (low - pos_low)
        logits = [dot * scores.scale for dot in own] if mode == "in_batch_negatives" else []
    parts = [rest, *((logit - pos) - pos_low for logit in logits)]
    if mode != "hard_negatives":
        # the positive itself, less itself
        parts.append(torch.zeros_like(pos))
    return torch.stack(parts).logsumexp(0), pos, pos_low, columns


def _check(
    queries: Tensor,
    docs: Tensor,
    negatives: Sequence[Tensor],
    scale: Tensor | float,
    directions: Sequence[str],
    partition_mode: str,
    hardness_mode: str | None,
    hardness_strength: float,
) -> None:
    name = "ranking_loss"
    for column in (docs, *negatives):
        check_pair(queries, column, name)
        if column.shape[0] != queries.shape[0]:
            raise ValueError(
                f"{name}: every column of documents needs one row per query, {queries.shape[0]}, got "
                f"{column.shape[0]}"
            )
    unknown = [direction for direction in directions if direction not in _DIRECTIONS]
    if unknown or "query_to_doc" not in directions:
        raise ValueError(
            f"{name}: directions must hold 'query_to_doc', which has the positive, and others of {_DIRECTIONS}, "
            f"got {tuple(directions)}"
        )
    if partition_mode not in ("joint", "per_direction"):
        raise ValueError(f"{name}: partition_mode must be 'joint' or 'per_direction', got {partition_mode!r}")
    if partition_mode == "per_direction" and {"query_to_query", "doc_to_doc"} & set(directions):
        raise ValueError(
            f"{name}: partition_mode='per_direction' needs the positive in every direction, which "
            "'query_to_query' and 'doc_to_doc' lack; use 'joint'"
        )
    if hardness_mode not in _HARDNESS:
        raise ValueError(f"{name}: hardness_mode must be one of {_HARDNESS}, got {hardness_mode!r}")
    if not hardness_strength >= 0.0:
        raise ValueError(f"{name}: hardness_strength must be >= 0, got {hardness_strength}")
    if hardness_mode is not None and not isinstance(scale, Tensor) and not scale > 0.0:
        raise ValueError(f"{name}: hardness needs a scale above 0, got {scale}")


@follows_autocast
def ranking_loss(
    queries: Tensor,
    docs: Tensor,
    negatives: Sequence[Tensor] | None = None,
    scale: Tensor | float = 20.0,
    *,
    directions: Sequence[Direction] = ("query_to_doc",),
    partition_mode: PartitionMode = "joint",
    hardness_mode: HardnessMode | None = None,
    hardness_strength: float = 0.0,
    reduction: Reduction = "mean",
    group: Group = None,
    gather: bool | None = None,
    grad_reduction: GradReduction = "ddp_mean",
    method: Method = "auto",
) -> Tensor:
    """Multiple-negatives ranking loss of sentence-transformers in O(N·D) memory.

    Args:
        queries: (B, D), normalised by the caller for cosines.
        docs: (B, D), row i is the positive of query i; the other rows are in-batch negatives.
        negatives: columns of hard negatives, each (B, D), row i mined for query i; or None.
        scale: multiplier of the dot products, > 0.
        directions: score sets, "query_to_doc" and any of "query_to_query" (other queries are negatives),
            "doc_to_query" (the positive against all queries), "doc_to_doc" (the positive against documents
            of other queries).
        partition_mode: "joint", one softmax over all sets; "per_direction", the mean of one softmax each,
            for "query_to_doc" and "doc_to_query" only.
        hardness_mode: whose logits in query_to_doc get hardness_strength times their dot product, constant
            for gradients, on top (Lan et al. 2025): "in_batch_negatives" (documents of other queries),
            "hard_negatives" (the query's own hard negatives), "all_negatives"; None for nobody's.
        hardness_strength: >= 0, not multiplied by `scale`.
        reduction, group, gather, grad_reduction, method: as in `infonce_loss`; no ring.

    Returns:
        0-dim loss, the same on every rank, or this rank's (B,) terms for "none"; fp32 (fp64 for fp64).

    Raises:
        TypeError, ValueError: inputs that do not fit.
    """
    name = "ranking_loss"
    negatives = [] if negatives is None else list(negatives)
    check_options(name, reduction, grad_reduction)
    _check(queries, docs, negatives, scale, directions, partition_mode, hardness_mode, hardness_strength)
    spread = transport_of(group, gather, name, ring=False) == "gather"
    factor = scale_tensor(scale, queries, name)
    scores = _Scores(queries, docs, negatives, factor, group, spread, method)
    doc_to_query = "doc_to_query" in directions
    if hardness_mode == "hard_negatives" and not negatives:
        hardness_mode = None
    if hardness_mode is None or hardness_strength == 0.0:
        first, pos, pos_low, columns = scores.both(None, doc_to_query)
    else:
        first, pos, pos_low, columns = _hardened(scores, hardness_mode, hardness_strength, doc_to_query)
    # every set less the positive: the differences are small and the log-sum-exps are not
    parts = [first] if columns is None else [first, columns]
    if "query_to_query" in directions:
        every_query = scores.everybody(queries)
        lse, low = scores.rows(queries, every_query, factor, scores.everyone)
        parts.append((lse - pos) + (low - pos_low))
    if "doc_to_doc" in directions:
        lse, low = scores.rows(docs, scores.every_doc, factor, scores.doc_ids)
        parts.append((lse - pos) + (low - pos_low))
    if len(parts) == 1:
        terms = parts[0]
    elif partition_mode == "joint":
        terms = torch.stack(parts).logsumexp(0)
    else:
        terms = torch.stack(parts).mean(0)
    return reduce_terms(terms, scores.total, reduction, grad_reduction, group, spread)
