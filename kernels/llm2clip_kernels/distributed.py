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


def widen_lse(lse: Tensor, low: Tensor) -> Tensor:
    """Log-sum-exps and what rounding took from them, in fp64; an infinite one has nothing to add."""
    return lse.double() + torch.where(lse.isfinite(), low, torch.zeros_like(low)).double()


def round_lse(wide: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """fp64 log-sum-exps rounded to `dtype`, and what that took."""
    lse = wide.to(dtype)
    return lse, torch.where(lse.isfinite(), wide - lse, torch.zeros_like(wide)).to(dtype)


class _MergeColumns(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, partial: Tensor, low: Tensor, counts: list[int], group: Group
    ) -> tuple[Tensor, Tensor]:
        wide = widen_lse(partial, low)
        largest = wide.clone()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        # an infinite maximum cannot be subtracted
        shift = torch.where(largest.isfinite(), largest, torch.zeros_like(largest))
        total = (wide - shift).exp()
        dist.all_reduce(total, group=group)
        merged = total.log() + shift
        ctx.counts, ctx.group = counts, group
        # the share of this rank, in fp64: at large scales a difference of fp32 log-sum-exps has no digits left
        share = torch.where(wide == -torch.inf, torch.zeros_like(wide), (wide - merged).exp())
        ctx.save_for_backward(share.to(partial.dtype))
        rank = dist.get_rank(group)
        start = sum(counts[:rank])
        column, column_low = round_lse(merged[start : start + counts[rank]], partial.dtype)
        ctx.mark_non_differentiable(column_low)
        return column, column_low

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (share,) = ctx.saved_tensors
        # the owner of a column knows its gradient, every rank holds a share of its sum
        return _gather(grads[0], ctx.counts, ctx.group) * share, None, None, None


class _SumAndScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, partial: Tensor, counts: list[int], group: Group) -> Tensor:
        ctx.counts, ctx.group = counts, group
        return _sum_and_scatter(partial, counts, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _gather(grads[0], ctx.counts, ctx.group), None, None


class _MergeAverages(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        partial: Tensor,
        low: Tensor,
        weight: Tensor,
        weight_low: Tensor,
        counts: list[int],
        group: Group,
    ) -> tuple[Tensor, Tensor]:
        wide, lse = widen_lse(partial, low), widen_lse(weight, weight_low)
        largest = lse.clone()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        share = (lse - torch.where(largest.isfinite(), largest, torch.zeros_like(largest))).exp()
        sums = torch.stack([share * wide, share])
        dist.all_reduce(sums, group=group)
        ctx.counts, ctx.group = counts, group
        ctx.save_for_backward((share / sums[1]).to(partial.dtype))
        rank = dist.get_rank(group)
        mine = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
        average, average_low = round_lse(sums[0, mine] / sums[1, mine], partial.dtype)
        ctx.mark_non_differentiable(average_low)
        return average, average_low

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        (share,) = ctx.saved_tensors
        return _gather(grads[0], ctx.counts, ctx.group) * share, None, None, None, None, None


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


class _SumGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return value.view_as(value)

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
    def forward(ctx: Any, value: Tensor, factor: Tensor | float) -> Tensor:
        ctx.number = None if isinstance(factor, Tensor) else factor
        ctx.save_for_backward(factor if isinstance(factor, Tensor) else None)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        factor = ctx.saved_tensors[0] if ctx.number is None else ctx.number
        return (grads[0] * factor).to(grads[0].dtype), None


def gather_rows(rows: Tensor, counts: list[int], group: Group) -> Tensor:
    """All ranks' rows (N, ...) in rank order; the backward sums the gradients and returns each its own."""
    gathered: Tensor = _GatherRows.apply(rows, counts, group)
    return gathered


def merge_columns(partial: Tensor, low: Tensor, counts: list[int], group: Group) -> tuple[Tensor, Tensor]:
    """Column log-sum-exps over all ranks' rows, merged in fp64.

    Args:
        partial: (N,) log-sum-exp of every column over this rank's rows.
        low: (N,) what rounding took from `partial`; no gradient.
        counts: rows of every rank; column j belongs to the rank that holds row j.
        group: the process group.

    Returns:
        (B_r,) complete log-sum-exps of this rank's own columns, and what rounding took from them; backward
        multiplies by exp(partial - complete).
    """
    merged: tuple[Tensor, Tensor] = _MergeColumns.apply(partial, low, counts, group)
    return merged


def sum_and_scatter(partial: Tensor, counts: list[int], group: Group) -> Tensor:
    """This rank's (B_r, ...) rows of the sum over ranks of `partial` (N, ...); the backward gathers."""
    mine: Tensor = _SumAndScatter.apply(partial, counts, group)
    return mine


def merge_averages(
    partial: Tensor, low: Tensor, weight: Tensor, weight_low: Tensor, counts: list[int], group: Group
) -> tuple[Tensor, Tensor]:
    """Weighted averages along columns over all ranks' rows, merged in fp64.

    Args:
        partial: (N,) average of every column over this rank's rows.
        low: (N,) what rounding took from `partial`; no gradient.
        weight: (N,) logarithm of the sum of this rank's weights; no gradient.
        weight_low: (N,) what rounding took from it.
        counts: rows of every rank; column j belongs to the rank that holds row j.
        group: the process group.

    Returns:
        (B_r,) complete averages of this rank's own columns, and what rounding took from them; backward multiplies
        by this rank's share of the weights.
    """
    merged: tuple[Tensor, Tensor] = _MergeAverages.apply(partial, low, weight, weight_low, counts, group)
    return merged


def sum_over_ranks(value: Tensor, group: Group) -> Tensor:
    """The sum over ranks of a value that every rank's term then uses; the backward sums the gradients."""
    total: Tensor = _SumOverRanks.apply(value, group)
    return total


def sum_gradient(value: Tensor, group: Group) -> Tensor:
    """`value` itself; its gradient is the sum over the ranks, on every rank."""
    same: Tensor = _SumGradient.apply(value, group)
    return same


def report_sum(value: Tensor, group: Group) -> Tensor:
    """The sum over ranks as a number to show, with the gradient of this rank's term alone."""
    total: Tensor = _ReportSum.apply(value, group)
    return total


def scale_gradient(value: Tensor, factor: Tensor | float) -> Tensor:
    """`value` itself; its gradient is multiplied by `factor`, a number or a 0-dim tensor held constant."""
    scaled: Tensor = _ScaleGradient.apply(value, factor)
    return scaled
