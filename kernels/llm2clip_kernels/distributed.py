"""What a loss over a process group needs, with gradients: gathered rows, merged columns, sums.

One convention throughout: every rank has its own term L_r, and the backward of these functions makes the
gradient of Σ_r L_r with respect to this rank's inputs. Collectives stay outside custom ops. Ranks may hold
different numbers of rows.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup | None

# torch 2.13 renamed both and warns at the old names
_all_gather: Any = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


def row_counts(rows: int, group: Group, device: torch.device) -> list[int]:
    """Returns how many rows every rank of the group holds, in rank order."""
    mine = torch.tensor([rows], dtype=torch.int64, device=device)
    every = torch.empty(dist.get_world_size(group), dtype=torch.int64, device=device)
    _all_gather(every, mine, group=group)
    return [int(count) for count in every.tolist()]


def _gather(rows: Tensor, counts: list[int], group: Group) -> Tensor:
    """(B_r, ...) of every rank to (N, ...); padded on the way where the counts differ."""
    longest = max(counts)
    mine = rows.contiguous()
    if mine.shape[0] < longest:
        mine = torch.cat([mine, mine.new_zeros(longest - mine.shape[0], *mine.shape[1:])])
    every = mine.new_empty(len(counts) * longest, *mine.shape[1:])
    _all_gather(every, mine, group=group)
    if min(counts) == longest:
        return every
    return torch.cat([block[:count] for block, count in zip(every.split(longest), counts, strict=True)])


def _sum_and_scatter(rows: Tensor, counts: list[int], group: Group) -> Tensor:
    """(N, ...) partial on every rank to this rank's (B_r, ...) of the sum."""
    longest = max(counts)
    if min(counts) < longest:
        padded = rows.new_zeros(len(counts), longest, *rows.shape[1:])
        for block, part, count in zip(padded, rows.split(counts), counts, strict=True):
            block[:count] = part
        rows = padded.flatten(0, 1)
    mine = rows.new_empty(longest, *rows.shape[1:])
    _reduce_scatter(mine, rows.contiguous(), group=group)
    return mine[: counts[dist.get_rank(group)]]


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int], group: Group) -> Tensor:
        ctx.counts, ctx.group, ctx.dtype = counts, group, rows.dtype
        return _gather(rows, counts, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        # summed in fp32: W half-precision terms would lose what the kernels kept
        wide = grads[0].float() if grads[0].dtype in (torch.bfloat16, torch.float16) else grads[0]
        return _sum_and_scatter(wide, ctx.counts, ctx.group).to(ctx.dtype), None, None


class _MergeColumns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, partial: Tensor, counts: list[int], group: Group) -> Tensor:
        largest = partial.clone()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        # an infinite maximum cannot be subtracted
        shift = torch.where(largest.isfinite(), largest, torch.zeros_like(largest))
        total = (partial - shift).exp()
        dist.all_reduce(total, group=group)
        merged = total.log() + shift
        ctx.counts, ctx.group = counts, group
        ctx.save_for_backward(partial, merged)
        rank = dist.get_rank(group)
        start = sum(counts[:rank])
        return merged[start : start + counts[rank]].clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        partial, merged = ctx.saved_tensors
        # the owner of a column knows its gradient, every rank holds a share of its sum
        return _gather(grads[0], ctx.counts, ctx.group) * (partial - merged).exp(), None, None


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, group: Group) -> Tensor:
        ctx.group = group
        total = value.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


class _ReportSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, group: Group) -> Tensor:
        total = value.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.factor, None


def gather_rows(rows: Tensor, counts: list[int], group: Group) -> Tensor:
    """All ranks' rows (N, ...) in rank order; the backward sums the gradients and returns each its own."""
    gathered: Tensor = _GatherRows.apply(rows, counts, group)
    return gathered


def merge_columns(partial: Tensor, counts: list[int], group: Group) -> Tensor:
    """Column log-sum-exps over all ranks' rows.

    Args:
        partial: (N,) log-sum-exp of every column over this rank's rows.
        counts: rows of every rank; column j belongs to the rank that holds row j.
        group: the process group.

    Returns:
        (B_r,) complete log-sum-exps of this rank's own columns; backward multiplies by
        exp(partial - complete).
    """
    merged: Tensor = _MergeColumns.apply(partial, counts, group)
    return merged


def sum_over_ranks(value: Tensor, group: Group) -> Tensor:
    """The sum over ranks of a value that every rank's term then uses; the backward sums the gradients."""
    total: Tensor = _SumOverRanks.apply(value, group)
    return total


def report_sum(value: Tensor, group: Group) -> Tensor:
    """The sum over ranks as a number to show, with the gradient of this rank's term alone."""
    total: Tensor = _ReportSum.apply(value, group)
    return total


def scale_gradient(value: Tensor, factor: float) -> Tensor:
    """`value` itself; its gradient is multiplied by `factor`."""
    scaled: Tensor = _ScaleGradient.apply(value, factor)
    return scaled
