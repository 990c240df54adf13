"""The sigmoid loss over ranks without gathering y: its parts go round in a ring, their gradients after them.

In step k a rank computes on the part of the rank k places before it. Meanwhile that part travels on to the next rank
and the following one arrives; the gradient of the part before, to which every rank adds its share, is one step behind
and comes home after the last. At most two parts of y and two gradients are held at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..checks import scale_tensor
from ..distributed import Group
from ..sigmoid_loss.op import compute

Needs = tuple[bool, bool, bool, bool]


@dataclass(frozen=True)
class Ring:
    """Rows of y by rank, this rank's place, and the ranks before and after it in the default group."""

    counts: list[int]
    group: Group

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    def neighbour(self, distance: int) -> int:
        """Rank in the default group of the one `distance` places after this one."""
        group = dist.group.WORLD if self.group is None else self.group
        assert group is not None
        return dist.get_global_rank(group, (self.rank + distance) % len(self.counts))

    def pass_on(self, rows: Tensor, arriving: Tensor) -> list[Any]:
        """Starts sending `rows` to the next rank and receiving from the one before; returns what to wait for."""
        operations = [
            dist.P2POp(dist.isend, rows, self.neighbour(1), self.group),
            dist.P2POp(dist.irecv, arriving, self.neighbour(-1), self.group),
        ]
        return dist.batch_isend_irecv(operations)


def _wait(works: list[Any]) -> None:
    for work in works:
        work.wait()


def _sweep(
    ring: Ring,
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    x_groups: Tensor,
    y_groups: Tensor,
    weight: Tensor | None,
    needs: Needs,
) -> list[Tensor]:
    """Losses of this rank's rows (M,) and the gradients of Σ weight · loss over all ranks.

    y_groups are everybody's. Gradients as in `chunked.compute`.
    """
    world, need_y = len(ring.counts), needs[1]
    starts = [sum(ring.counts[:r]) for r in range(world)]
    results: list[Tensor] = []
    part = y.detach().contiguous()
    gradient, arriving_gradient = part.new_empty(0), part.new_empty(0)
    gradient_works: list[Any] = []
    for k in range(world):
        owner, next_owner = (ring.rank - k) % world, (ring.rank - k - 1) % world
        works: list[Any] = []
        arriving = part
        if k < world - 1:
            arriving = y.new_empty(ring.counts[next_owner], y.shape[1])
            works = ring.pass_on(part, arriving)
        # an empty slice where there are no groups
        ids = y_groups[starts[owner] : starts[owner] + ring.counts[owner]]
        # only a rank's own part holds its rows' positives
        diagonal = 0 if owner == ring.rank else part.shape[0]
        loss, dx, dy, dscale, dbias = compute(x, part, scale, bias, x_groups, ids, diagonal, weight, needs)
        if not results:
            results = [loss, dx, dscale, dbias]
        else:
            for sum_, term in zip(results, (loss, dx, dscale, dbias), strict=True):
                sum_ += term
        if need_y and world > 1:
            _wait(gradient_works)
            if k > 0:
                dy += arriving_gradient
            gradient, arriving_gradient = dy, dy.new_empty(ring.counts[next_owner], y.shape[1])
            gradient_works = ring.pass_on(gradient, arriving_gradient)
        elif need_y:
            arriving_gradient = dy
        _wait(works)
        part = arriving
    _wait(gradient_works)
    if not need_y:
        arriving_gradient = arriving_gradient[:0]
    return [results[0], results[1], arriving_gradient, results[2], results[3]]


class _RingSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor,
        scale: Tensor,
        bias: Tensor,
        x_groups: Tensor,
        y_groups: Tensor,
        ring: Ring,
        weight: float,
        needs: Needs,
    ) -> Tensor:
        weights = (
            None if weight == 1.0 else torch.full((x.shape[0],), weight, dtype=scale.dtype, device=x.device)
        )
        loss, *gradients = _sweep(ring, x, y, scale, bias, x_groups, y_groups, weights, needs)
        ctx.save_for_backward(*gradients)
        ctx.dtypes = x.dtype, y.dtype, scale.dtype, bias.dtype
        ctx.needs = needs
        return loss.sum() * weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        dx, dy, dscale, dbias = (
            (gradient * g).to(dtype) if need else None
            for gradient, dtype, need in zip(ctx.saved_tensors, ctx.dtypes, ctx.needs, strict=True)
        )
        scalars = (None if t is None else t.reshape(()) for t in (dscale, dbias))
        return (dx, dy, *scalars, None, None, None, None, None)


class _RingRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor,
        scale: Tensor,
        bias: Tensor,
        x_groups: Tensor,
        y_groups: Tensor,
        ring: Ring,
        needs: Needs,
    ) -> Tensor:
        ctx.save_for_backward(x, y, scale, bias, x_groups, y_groups)
        ctx.ring, ctx.needs = ring, needs
        return _sweep(ring, x, y, scale, bias, x_groups, y_groups, None, (False,) * 4)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, y, scale, bias, x_groups, y_groups = ctx.saved_tensors
        gradients = _sweep(ctx.ring, x, y, scale, bias, x_groups, y_groups, g, ctx.needs)[1:]
        out = [
            gradient.to(t.dtype).reshape(t.shape) if need else None
            for gradient, t, need in zip(gradients, (x, y, scale, bias), ctx.needs, strict=True)
        ]
        return (*out, None, None, None, None)


def ring_terms(
    x: Tensor,
    y: Tensor,
    scale: Tensor | float,
    bias: Tensor | float,
    x_groups: Tensor | None,
    y_groups: Tensor | None,
    *,
    counts: list[int],
    rows: bool,
    weight: float,
    group: Group,
) -> Tensor:
    """`local_sigmoid_terms` over a group, by the ring; y_groups are everybody's, counts the rows of y by rank."""
    factor = scale_tensor(scale, x, "sigmoid_loss")
    offset = scale_tensor(bias, x, "sigmoid_loss", "bias")
    needs = tuple(torch.is_grad_enabled() and t.requires_grad for t in (x, y, factor, offset))
    none = torch.empty(0, dtype=torch.int64, device=x.device)
    groups = [none if ids is None else ids.to(torch.int64) for ids in (x_groups, y_groups)]
    ring = Ring(counts, group)
    result: Tensor
    if rows:
        result = _RingRows.apply(x, y, factor, offset, *groups, ring, needs)
    else:
        result = _RingSum.apply(x, y, factor, offset, *groups, ring, weight, needs)
    return result
