"""Row and column log-sum-exps over a ring of ranks: y travels shard by shard, O(B·D) memory per rank.

At step s rank r holds the shard of rank r - s and passes it on while it computes with it. Row sums stay and are
merged over the steps; column sums travel with their shard and are home after as many steps as there are ranks.
The backward is a second ring, in which the shards' complete column sums and the accumulators of dy travel too.
Every rank issues the same transfers in the same order, all of them without waiting, so no rank can block
another whatever the backend.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..checks import accumulator
from ..distributed import Group, round_lse, widen_lse
from ..similarity_lse.op import NO_DIAGONAL
from .groups import group_logit_sums


class Links(NamedTuple):
    """This rank's place on the ring, and how many rows of y every rank holds."""

    group: Group
    rank: int
    counts: list[int]

    def owner(self, step: int) -> int:
        """Which rank's shard is here at `step`."""
        return (self.rank - step) % len(self.counts)

    def pass_on(self, mine: Tensor, rows: int) -> tuple[Tensor, list[dist.Work]]:
        """Starts sending `mine` to the next rank and receiving `rows` of the same kind from the one before."""
        world = len(self.counts)
        after, before = (self.rank + 1) % world, (self.rank - 1) % world
        if self.group is not None:
            after, before = (dist.get_global_rank(self.group, r) for r in (after, before))
        coming = mine.new_empty(rows, *mine.shape[1:])
        transfers = [
            dist.P2POp(dist.isend, mine.contiguous(), after, self.group),
            dist.P2POp(dist.irecv, coming, before, self.group),
        ]
        return coming, dist.batch_isend_irecv(transfers)


def _wait(transfers: list[dist.Work]) -> None:
    for transfer in transfers:
        transfer.wait()


class _RingLse(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor,
        scale: Tensor,
        x_ids: Tensor | None,
        every_y_ids: Tensor | None,
        paired: bool,
        masked: bool,
        sums: bool,
        links: Links,
    ) -> tuple[Tensor, ...]:
        world = len(links.counts)
        wide = accumulator(x.dtype)
        shards_ids = None if every_y_ids is None else every_y_ids.split(links.counts)
        row = x.new_full((x.shape[0],), -torch.inf, dtype=torch.float64)
        row_group = x.new_zeros(x.shape[0], dtype=wide)
        pos = pos_low = x.new_empty(0, dtype=wide)
        shard = y.contiguous()
        # what travels with a shard: the log-sum-exps of its columns so far, and their sums within groups
        carried = torch.stack([torch.full_like(y[:, 0], -torch.inf), torch.zeros_like(y[:, 0])], 1).double()
        for step in range(world):
            owner, following = links.owner(step), links.owner(step + 1)
            coming = shard
            arriving: list[dist.Work] = []
            if step + 1 < world:
                coming, arriving = links.pass_on(shard, links.counts[following])
            own = paired and step == 0
            ids = (x_ids, shards_ids[owner]) if x_ids is not None and shards_ids is not None else None
            outputs = torch.ops.llm2clip_kernels.similarity_lse(
                x, shard, scale, True, 0 if own else NO_DIAGONAL, False, *_mask(ids, masked, x)
            )
            m, n = x.shape[0], shard.shape[0]
            low = outputs[3]
            row = torch.logaddexp(row, widen_lse(outputs[0], low[:m]))
            if own:
                pos, pos_low = outputs[2], low[m + n :]
            column = torch.logaddexp(carried[:, 0], widen_lse(outputs[1], low[m : m + n]))
            column_group = carried[:, 1]
            if sums and ids is not None:
                by_row, by_column = group_logit_sums(x, shard, scale, *ids, own)
                row_group, column_group = row_group + by_row, column_group + by_column
            carried = torch.stack([column, column_group], 1)
            if world > 1:
                carried, arriving_sums = links.pass_on(carried, links.counts[following])
                _wait(arriving + arriving_sums)
            shard = coming
        row_lse, row_low = round_lse(row, wide)
        col_lse, col_low = round_lse(carried[:, 0], wide)
        ctx.options = paired, masked, sums, links
        ctx.save_for_backward(x, y, scale, row_lse, row_low, col_lse, col_low, x_ids, every_y_ids)
        ctx.mark_non_differentiable(row_low, col_low, pos_low)
        return row_lse, row_low, col_lse, col_low, pos, pos_low, row_group, carried[:, 1].to(wide)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, y, scale, row_lse, row_low, col_lse, col_low, x_ids, every_y_ids = ctx.saved_tensors
        paired, masked, sums, links = ctx.options
        need_x, need_y, need_scale = ctx.needs_input_grad[:3]
        g_row, _, g_col, _, g_pos, _, g_row_group, g_col_group = grads
        world = len(links.counts)
        wide = accumulator(x.dtype)
        shards_ids = None if every_y_ids is None else every_y_ids.split(links.counts)
        none = row_lse.new_empty(0)
        dx = torch.zeros_like(x, dtype=wide) if need_x else none
        dscale = torch.zeros_like(scale)
        dy = coming_dy = none
        arriving_dy: list[dist.Work] = []
        shard, carried = y.contiguous(), torch.stack([col_lse, col_low, g_col, g_col_group], 1)
        for step in range(world):
            owner, following = links.owner(step), links.owner(step + 1)
            coming, coming_carried = shard, carried
            arriving: list[dist.Work] = []
            if step + 1 < world:
                coming, arriving = links.pass_on(shard, links.counts[following])
                coming_carried, more = links.pass_on(carried, links.counts[following])
                arriving += more
            own = paired and step == 0
            ids = (x_ids, shards_ids[owner]) if x_ids is not None and shards_ids is not None else None
            column, column_low, g_column, g_column_group = carried.T.contiguous().unbind(0)
            low = torch.cat([row_low, column_low, torch.zeros_like(row_low) if own else none])
            part_x, part_y, part_scale = torch.ops.llm2clip_kernels.similarity_lse_backward(
                g_row, g_column, g_pos if own else none, x, shard, scale, row_lse, column, low, none,
                0 if own else NO_DIAGONAL, *_mask(ids, masked, x), need_x, need_y, need_scale,
            )  # fmt: skip
            if need_x:
                dx += part_x
            dy = part_y.to(wide)
            dscale += part_scale
            if sums and ids is not None:
                more_x, more_y, more_scale = _group_gradients(
                    x, shard, scale, ids, own, (g_row_group, g_column_group)
                )
                if need_x:
                    dx += more_x
                if need_y:
                    dy += more_y
                dscale += more_scale
            if need_y:
                # the sums over the ranks before this one were on their way while it computed
                _wait(arriving_dy)
                if step > 0:
                    dy += coming_dy
                if world > 1:
                    coming_dy, arriving_dy = links.pass_on(dy, links.counts[following])
            _wait(arriving)
            shard, carried = coming, coming_carried
        if need_y and world > 1:
            _wait(arriving_dy)
            dy = coming_dy
        return (
            dx.to(x.dtype) if need_x else None,
            dy.to(y.dtype) if need_y else None,
            dscale if need_scale else None,
            *[None] * 6,
        )


def _mask(ids: tuple[Tensor, Tensor] | None, masked: bool, like: Tensor) -> tuple[Tensor, Tensor]:
    if masked and ids is not None:
        return ids
    none = torch.empty(0, dtype=torch.int64, device=like.device)
    return none, none.clone()


def _group_gradients(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    ids: tuple[Tensor, Tensor],
    own: bool,
    gradients: tuple[Tensor, Tensor],
) -> tuple[Tensor, ...]:
    leaves = [t.detach().to(accumulator(t.dtype)).requires_grad_() for t in (x, y, scale)]
    with torch.enable_grad():
        outputs = group_logit_sums(leaves[0], leaves[1], leaves[2], *ids, own)
    return torch.autograd.grad(outputs, leaves, gradients)


def ring_lse(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    *,
    counts: list[int],
    paired: bool,
    x_ids: Tensor | None,
    every_y_ids: Tensor | None,
    masked: bool,
    sums: bool,
    group: Group,
) -> tuple[Tensor, ...]:
    """Statistics of S = scale · x yᵀ with y passed around the ranks of `group`.

    Args:
        x, y: (M, D), (N_r, D), this rank's.
        scale: 0-dim, of the accumulator's dtype.
        counts: rows of y of every rank.
        paired: row i of x belongs to row i of y.
        x_ids: (M,) int64 group ids of this rank, or None.
        every_y_ids: (N,) ids of all ranks' rows of y, or None.
        masked: leave other pairs of one group out of the log-sum-exps.
        sums: also sum logits within groups.
        group: the process group.

    Returns:
        row_lse (M,), what rounding took from it; col_lse (N_r,), the same; positive logits (M,), the same ((0,)
        where not paired); sums within groups by row (M,) and by column (N_r,), zeros where not asked for.
    """
    links = Links(group, dist.get_rank(group), counts)
    outputs: tuple[Tensor, ...] = _RingLse.apply(x, y, scale, x_ids, every_y_ids, paired, masked, sums, links)
    return outputs
