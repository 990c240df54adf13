"""`similarity_rank_stream`: exact ranks of features that lie on disk, block by block, split over ranks.

Every block pair is one pass of `similarity_rank`'s counts, so that the result is the same to the last tie; only two
blocks, the ids and the counts are in memory.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from ..autocast import full_precision
from ..checks import check_integers, check_pair
from ..distributed import Group
from .op import RankCounts, _best, _count, _finish

# rows of either side in memory at a time: 160 MiB each at D = 1280 in fp32
BLOCK_ROWS = 1 << 15


class _Side:
    """One side: blocks of its rows on the device, its ids, and what was found out about each row."""

    def __init__(self, values: Any, groups: Tensor, rows: int, device: torch.device, label: str) -> None:
        if not hasattr(values, "shape") or len(values.shape) != 2 or 0 in values.shape:
            found = tuple(values.shape) if hasattr(values, "shape") else type(values).__name__
            raise ValueError(
                f"similarity_rank_stream: {label} must be an array (rows, D) with rows, got {found}"
            )
        check_integers(groups, f"{label}_groups", "similarity_rank_stream")
        self.rows = int(values.shape[0])
        if groups.shape != (self.rows,):
            raise ValueError(
                f"similarity_rank_stream: {label}_groups must hold one id for each of {self.rows} rows, got "
                f"{tuple(groups.shape)}"
            )
        self.values, self.device = values, device
        self.groups = groups.to(device=device, dtype=torch.int64)
        self.blocks = [slice(start, min(start + rows, self.rows)) for start in range(0, self.rows, rows)]
        self.best = torch.full((self.rows,), -torch.inf, dtype=torch.float64, device=device)
        self.scored = torch.zeros(self.rows, dtype=torch.int64, device=device)
        self.right = torch.zeros(self.rows, dtype=torch.int64, device=device)
        self.counts = torch.zeros(3, self.rows, dtype=torch.int64, device=device)

    def block(self, part: slice) -> Tensor:
        values = self.values[part]
        # a copy where it is no tensor: a memory map may be read-only, which a tensor cannot be
        tensor = values if isinstance(values, Tensor) else torch.tensor(values)
        return tensor.detach().to(self.device).contiguous()

    def keep_best(self, part: slice, best: Tensor, right: Tensor) -> None:
        scored = best.isnan().logical_not()
        self.best[part] = torch.maximum(self.best[part], best.nan_to_num(nan=-torch.inf))
        self.scored[part] |= scored.long()
        self.right[part] += right

    def finish(self, candidates: int) -> RankCounts:
        return _finish(self.counts, self.thresholds(), self.right, candidates)

    def thresholds(self) -> Tensor:
        return self.best.masked_fill(self.scored == 0, torch.nan)


@torch.no_grad()
def similarity_rank_stream(
    x: Any,
    y: Any,
    *,
    x_groups: Tensor,
    y_groups: Tensor,
    tolerance: float = 0.0,
    directions: Literal["both", "rows"] = "both",
    rows: int = BLOCK_ROWS,
    device: torch.device | str = "cpu",
    group: Group = None,
    gather: bool | None = None,
) -> tuple[RankCounts, RankCounts | None]:
    """`similarity_rank_counts` of features larger than memory.

    Args:
        x: (M, D) array with `shape` and slices of rows, such as a numpy memory map or a tensor.
        y: (N, D) array, of x's dtype.
        x_groups: (M,) int64, and
        y_groups: (N,) int64: all pairs of equal ids >= 0 are right answers, and the best one counts.
        tolerance: as in `similarity_rank`.
        directions: "both", or "rows" for the rows of x alone.
        rows: of either side that are in memory at a time.
        device: where products are computed and counts are returned.
        group: process group to split the work over; every rank gives all of x and y and gets all counts.
        gather: whether to split the work; None: exactly when `group` is given. True with group None is the
            default group.

    Returns:
        Counts of all rows of x and of all rows of y (None for directions="rows"), equal to those of
        `similarity_rank_counts` over the whole arrays.

    Raises:
        TypeError, ValueError: inputs that do not fit.

    Examples:
        >>> images = numpy.memmap("images.bin", "float32", "r", shape=(1_000_000, 768))
        >>> of_texts, of_images = similarity_rank_stream(texts, images, x_groups=owner, y_groups=ids)
    """
    if rows < 1:
        raise ValueError(f"similarity_rank_stream: rows must be 1 or more, got {rows}")
    if directions not in ("both", "rows"):
        raise ValueError(f"similarity_rank_stream: directions must be 'both' or 'rows', got {directions!r}")
    if not 0.0 <= tolerance < float("inf"):
        raise ValueError(f"similarity_rank_stream: tolerance must be a number >= 0, got {tolerance}")
    where = torch.device(device)
    of_x, of_y = _Side(x, x_groups, rows, where, "x"), _Side(y, y_groups, rows, where, "y")
    check_pair(of_x.block(slice(0, 1)), of_y.block(slice(0, 1)), "similarity_rank_stream")
    spread = group is not None if gather is None else gather
    rank, size = (dist.get_rank(group), dist.get_world_size(group)) if spread else (0, 1)
    columns = directions == "both"
    for part in of_x.blocks[rank::size]:
        _find_best(of_x, of_y, part)
    if spread:
        for side in (of_x, of_y):
            dist.all_reduce(side.best, op=dist.ReduceOp.MAX, group=group)
            dist.all_reduce(side.scored, op=dist.ReduceOp.MAX, group=group)
            dist.all_reduce(side.right, group=group)
    row_best, col_best = of_x.thresholds(), of_y.thresholds()
    for part in of_x.blocks[rank::size]:
        block, groups = of_x.block(part), of_x.groups[part]
        for other in of_y.blocks:
            best = col_best[other] if columns else col_best[:0]
            with full_precision(where):
                counted, across = _count(
                    block,
                    of_y.block(other),
                    groups,
                    of_y.groups[other],
                    row_best[part],
                    best,
                    float(tolerance),
                )
            of_x.counts[:, part] += counted
            if columns:
                of_y.counts[:, other] += across
    if spread:
        dist.all_reduce(of_x.counts, group=group)
        if columns:
            dist.all_reduce(of_y.counts, group=group)
    return of_x.finish(of_y.rows), of_y.finish(of_x.rows) if columns else None


def _find_best(x: _Side, y: _Side, part: slice) -> None:
    """Best right answers of one block of x's rows, and of y's rows within it; other blocks are not read."""
    block: Tensor | None = None
    groups = x.groups[part]
    known = groups[groups >= 0]
    for other in y.blocks:
        if not bool(torch.isin(y.groups[other], known).any()):
            continue
        block = x.block(part) if block is None else block
        row, row_right, col, col_right = _best(block, y.block(other), groups, y.groups[other])
        x.keep_best(part, row, row_right)
        y.keep_best(other, col, col_right)


__all__ = ["similarity_rank_stream"]
