"""The sigmoid loss over ranks without gathering y: its parts go round in a ring, their gradients after them.

In step k a rank computes on the part of the rank k places before it. Meanwhile that part travels on to the next rank
and the following one arrives; the gradient of the part before, to which every rank adds its share, is one step behind
and comes home after the last. At most two parts of y and two gradients are held at a time.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..checks import scale_tensor
from ..distributed import Group
from ..sigmoid_loss.op import compute
from .ring import Links

Needs = tuple[bool, bool, bool, bool]


def _wait(transfers: list[dist.Work]) -> None:
    for transfer in transfers:
        transfer.wait()


def _sweep(
    links: Links,
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
    world, need_y = len(links.counts), needs[1]
    starts = [sum(links.counts[:r]) for r in range(world)]
    results: list[Tensor] = []
    part = y.detach().contiguous()
    gradient = coming_gradient = part.new_empty(0)
    gradient_arriving: list[dist.Work] = []
    for step in range(world):
        owner, rows_after = links.owner(step), links.counts[links.owner(step + 1)]
        coming, arriving = links.pass_on(part, rows_after) if step + 1 < world else (part, [])
        # an empty slice where there are no groups
        ids = y_groups[starts[owner] : starts[owner] + links.counts[owner]]
        # only a rank's own part holds its rows' positives
        diagonal = 0 if step == 0 else part.shape[0]
        loss, dx, dy, dscale, dbias = compute(x, part, scale, bias, x_groups, ids, diagonal, weight, needs)
        if not results:
            results = [loss, dx, dscale, dbias]
        else:
            for sum_, term in zip(results, (loss, dx, dscale, dbias), strict=True):
                sum_ += term
        if need_y:
            # the sum over the ranks before this one was on its way while this one computed
            _wait(gradient_arriving)
            gradient = dy if step == 0 else dy.add_(coming_gradient)
            if world > 1:
                coming_gradient, gradient_arriving = links.pass_on(gradient, rows_after)
        _wait(arriving)
        part = coming
    if need_y and world > 1:
        _wait(gradient_arriving)
        gradient = coming_gradient
    return [results[0], results[1], gradient, results[2], results[3]]


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
        links: Links,
        weight: float,
        needs: Needs,
    ) -> Tensor:
        weights = (
            None if weight == 1.0 else torch.full((x.shape[0],), weight, dtype=scale.dtype, device=x.device)
        )
        loss, *gradients = _sweep(links, x, y, scale, bias, x_groups, y_groups, weights, needs)
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
        links: Links,
        needs: Needs,
    ) -> Tensor:
        ctx.save_for_backward(x, y, scale, bias, x_groups, y_groups)
        ctx.links, ctx.needs = links, needs
        return _sweep(links, x, y, scale, bias, x_groups, y_groups, None, (False,) * 4)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, y, scale, bias, x_groups, y_groups = ctx.saved_tensors
        gradients = _sweep(ctx.links, x, y, scale, bias, x_groups, y_groups, g, ctx.needs)[1:]
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
    links = Links(group, dist.get_rank(group), counts)
    result: Tensor
    if rows:
        result = _RingRows.apply(x, y, factor, offset, *groups, links, needs)
    else:
        result = _RingSum.apply(x, y, factor, offset, *groups, links, weight, needs)
    return result
