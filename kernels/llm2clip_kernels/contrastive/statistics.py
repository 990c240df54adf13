"""What a loss needs to know about the similarity matrix: log-sum-exps, positives and sums within groups.

One process, or one of two ways over a process group, which differ in what travels and not in what comes out:

- "gather": y is all-gathered; this rank owns (B_r, N) of S, whose rows are complete; all-reduces of N
  numbers complete the columns.
- "ring": y travels shard by shard (ring.py); a rank holds two shards of it at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from .. import distributed
from ..checks import accumulator
from ..distributed import Group
from ..similarity_lse.op import NO_DIAGONAL, Method, similarity_lse_with_positives
from .groups import group_logit_sums, group_sizes
from .ring import ring_lse

Transport = Literal["local", "gather", "ring"]


@dataclass(frozen=True)
class Statistics:
    """Of this rank's M rows of x and N rows of y; fp32, or fp64 for fp64.

    Attributes:
        row, row_low: (M,) log-sum-exp over the columns of all ranks, and what rounding took from it.
        col, col_low: (N,) the same over the rows of all ranks.
        pos, pos_low: (M,) logit of the own pair, and what rounding took; (0,) where x and y do not pair up.
        row_group, col_group: (M,), (N,) sums of logits within the group but for the own pair.
        row_size, col_size: (M,), (N,) how many pairs those sums have.
        rows, columns: rows of x and of y over all ranks.
    """

    row: Tensor
    row_low: Tensor
    col: Tensor
    col_low: Tensor
    pos: Tensor
    pos_low: Tensor
    row_group: Tensor
    col_group: Tensor
    row_size: Tensor
    col_size: Tensor
    rows: int
    columns: int


def _against_all(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    counts: list[int],
    rank: int,
    paired: bool,
    x_ids: Tensor | None,
    every_y_ids: Tensor | None,
    masked: bool,
    sums: bool,
    group: Group,
    gathered: bool,
    method: Method,
) -> tuple[Tensor, ...]:
    """The eight tensors of `ring_lse`, with the rows of y of all ranks in one memory."""
    every_y = distributed.gather_rows(y, counts, group) if gathered else y
    first = sum(counts[:rank])
    row, col, pos, low = similarity_lse_with_positives(
        x, every_y, scale, diagonal=first if paired else NO_DIAGONAL, method=method,
        x_groups=x_ids if masked else None, y_groups=every_y_ids if masked else None,
    )  # fmt: skip
    assert col is not None
    row_low, col_low, pos_low = low.split([row.numel(), col.numel(), low.numel() - row.numel() - col.numel()])
    if gathered:
        col, col_low = distributed.merge_columns(col, col_low, counts, group)
    row_group, col_group = torch.zeros_like(row), torch.zeros_like(col)
    if sums:
        assert x_ids is not None and every_y_ids is not None
        by_row, by_column = [], []
        for owner, (block, ids) in enumerate(
            zip(every_y.split(counts), every_y_ids.split(counts), strict=True)
        ):
            of_rows, of_columns = group_logit_sums(x, block, scale, x_ids, ids, paired and owner == rank)
            by_row.append(of_rows)
            by_column.append(of_columns)
        row_group, col_group = torch.stack(by_row).sum(0), torch.cat(by_column)
        if gathered:
            col_group = distributed.sum_and_scatter(col_group, counts, group)
    return row, row_low, col, col_low, low.new_empty(0) if pos is None else pos, pos_low, row_group, col_group


def pair_statistics(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    *,
    paired: bool = True,
    x_ids: Tensor | None = None,
    y_ids: Tensor | None = None,
    masked: bool = False,
    sums: bool = False,
    transport: Transport = "local",
    group: Group = None,
    method: Method = "auto",
) -> Statistics:
    """Statistics of S = scale · x yᵀ over one process or a process group.

    Args:
        x, y: (M, D), (N, D), this rank's.
        scale: 0-dim, of the accumulator's dtype.
        paired: row i of x belongs to row i of y (M = N on every rank).
        x_ids, y_ids: (M,), (N,) int64 group ids, or None.
        masked: leave pairs of one group, other than the own pair, out of the log-sum-exps.
        sums: also sum the logits within groups (zeros otherwise).
        transport, group: how rows of other ranks take part.
        method: as in `similarity_lse`; "ring" always recomputes.

    Returns:
        Statistics, whose backward makes the gradient of the sum over all ranks of what is made of them.
    """
    spread = transport != "local"
    rank = dist.get_rank(group) if spread else 0
    counts = distributed.row_counts(y.shape[0], group, x.device) if spread else [y.shape[0]]
    x_counts = counts
    if not paired:
        x_counts = distributed.row_counts(x.shape[0], group, x.device) if spread else [x.shape[0]]
    every_x_ids, every_y_ids = x_ids, y_ids
    if spread and x_ids is not None and y_ids is not None:
        every_x_ids = distributed.gather_rows(x_ids, x_counts, group)
        every_y_ids = distributed.gather_rows(y_ids, counts, group)
    if transport == "ring":
        parts = ring_lse(
            x, y, scale, counts=counts, paired=paired, x_ids=x_ids, every_y_ids=every_y_ids, masked=masked,
            sums=sums, group=group,
        )  # fmt: skip
    else:
        parts = _against_all(
            x, y, scale, counts, rank, paired, x_ids, every_y_ids, masked, sums, group, spread, method
        )
    row_size, col_size = torch.zeros_like(parts[0]), torch.zeros_like(parts[2])
    if x_ids is not None and y_ids is not None and every_x_ids is not None and every_y_ids is not None:
        own = ((x_ids == y_ids) & (x_ids >= 0)).to(accumulator(x.dtype)) if paired else 0.0
        row_size = row_size + group_sizes(x_ids, every_y_ids) - own
        col_size = col_size + group_sizes(y_ids, every_x_ids) - own
    return Statistics(*parts, row_size, col_size, sum(x_counts), sum(counts))  # type: ignore[call-arg, arg-type]
