"""Scores of single pairs in fp64, and the pairs of rows and columns that belong together."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .. import backend

# features of one side gathered at a time, in fp64: 32 MiB
_PAIR_ELEMENTS = 1 << 22


def pair_scores(x: Tensor, y: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """Returns x[rows]·y[cols] (P,) in fp64, the same bits for the same features wherever they stand.

    x (M, D) and y (N, D) contiguous, rows and cols (P,) int64.
    """
    if backend.choose(x.device, x.dtype) == "native":
        scores: Tensor = torch.ops.llm2clip_native.pair_scores(
            x.float(), y.float(), rows.contiguous(), cols.contiguous()
        )
        return scores
    step = max(1, _PAIR_ELEMENTS // x.shape[1])
    if rows.numel() == 0:
        return x.new_empty(0, dtype=torch.float64)
    parts = [
        _fixed_sum(x[i].double() * y[j].double())
        for i, j in zip(rows.split(step), cols.split(step), strict=True)
    ]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _fixed_sum(terms: Tensor) -> Tensor:
    """(P, D) to (P,), folding halves: an order that depends on D alone, unlike a library's reduction."""
    while terms.shape[1] > 1:
        half = terms.shape[1] // 2
        folded = terms[:, :half] + terms[:, half : 2 * half]
        terms = torch.cat([folded, terms[:, 2 * half :]], dim=1) if terms.shape[1] % 2 else folded
    return terms[:, 0]


def positive_pairs(x_groups: Tensor, y_groups: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Every pair (row, column) that belongs together, in parts of bounded size.

    Args:
        x_groups: (M,) int64; of each row the group, or the column where `y_groups` is empty. Below 0: nothing.
        y_groups: (N,) int64, or empty.

    Yields:
        rows (P,) int64, columns (P,) int64, and which of these pairs are meant (P,) bool.
    """
    every = torch.arange(x_groups.shape[0], device=x_groups.device)
    if y_groups.numel() == 0:
        # a mask rather than fewer pairs: their number would have to be asked of the device
        yield every, x_groups.clamp_min(0), x_groups >= 0
        return
    order = torch.argsort(y_groups, stable=True)
    ordered = y_groups[order]
    first = torch.searchsorted(ordered, x_groups)
    counts = torch.searchsorted(ordered, x_groups, right=True) - first
    counts = torch.where(x_groups < 0, torch.zeros_like(counts), counts)
    ends = counts.cumsum(0)
    start, done = 0, 0
    while start < x_groups.shape[0]:
        limit = torch.tensor(done + _PAIR_ELEMENTS // 4, device=ends.device)
        stop = max(int(torch.searchsorted(ends, limit, right=True)), start + 1)
        some = counts[start:stop]
        rows = torch.repeat_interleave(every[start:stop], some)
        before = (some.cumsum(0) - some)[rows - start]
        within = torch.arange(rows.shape[0], device=rows.device) - before
        yield rows, order[first[rows] + within], torch.ones_like(rows, dtype=torch.bool)
        done = int(ends[stop - 1])
        start = stop
