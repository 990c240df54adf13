"""The sigmoid loss on one device: schemas, checks, autograd, and the one place that picks the implementation.

With t_ij = scale · x_i·y_j + bias and z_ij = 1 for positive pairs, -1 for the others:

    loss_i = Σ_j softplus(-z_ij t_ij)          G_ij = w_i · -z_ij sigmoid(-z_ij t_ij)
    dx = scale · G y      dy = scale · Gᵀ x      dscale = Σ G ∘ (x yᵀ)      dbias = Σ G

G of a pair needs nothing but its own logit. So the sum of the rows' losses makes its gradients in the forward, from
the tile that made its value: 3 matmuls in all, and a backward that multiplies them by one number. Only losses kept
apart by row wait for their upstream gradients w and compute the tiles again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _env, backend
from ..autocast import follows_autocast, full_precision
from ..checks import accumulator, check_groups, check_pair, scale_tensor
from . import chunked, plain

# rows and columns of a CPU tile of fp32 dot products, 4 MiB, as in similarity_lse
_CPU_TILE = 1024
# read once: torch.compile must not trace into the environment
# half as many again: plain torch makes one matrix here, so that it stays ahead longer than for similarity_lse
_SMALL_PAIRS = 3 * _env.small_pairs() // 2


def compute(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    x_groups: Tensor,
    y_groups: Tensor,
    diagonal: int,
    weight: Tensor | None,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Row losses and gradients by the backend of x; arguments and results as in `chunked.compute`."""
    x, y = x.detach().contiguous(), y.detach().contiguous()
    x_groups, y_groups = x_groups.contiguous(), y_groups.contiguous()
    weight = None if weight is None else weight.to(accumulator(x.dtype)).contiguous()
    chosen = backend.choose(x.device, x.dtype)
    if chosen == "native":
        results: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = torch.ops.llm2clip_native.sigmoid_loss(
            x.float(), y.float(), scale.detach().item(), bias.detach().item(), x_groups, y_groups, diagonal,
            torch.empty(0) if weight is None else weight, *needs, _CPU_TILE,
        )  # fmt: skip
        return results
    implementation: Any = chunked
    if chosen == "triton":
        from . import kernel

        implementation = kernel
    with full_precision(x.device):
        computed: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = implementation.compute(
            x, y, scale.detach(), bias.detach(), x_groups, y_groups, diagonal, weight, *needs
        )
    return computed


@torch.library.custom_op("llm2clip_kernels::sigmoid_loss", mutates_args=())
def _summed(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    x_groups: Tensor,
    y_groups: Tensor,
    diagonal: int,
    need_x: bool,
    need_y: bool,
    need_scale: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    needs = (need_x, need_y, need_scale, need_bias)
    loss, *gradients = compute(x, y, scale, bias, x_groups, y_groups, diagonal, None, needs)
    dx, dy, dscale, dbias = gradients
    return loss.sum(), dx, dy, dscale, dbias


@_summed.register_fake
def _(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    x_groups: Tensor,
    y_groups: Tensor,
    diagonal: int,
    need_x: bool,
    need_y: bool,
    need_scale: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    wide = accumulator(x.dtype)
    return (
        x.new_empty((), dtype=wide),
        x.new_empty(x.shape[0] if need_x else 0, x.shape[1], dtype=wide),
        y.new_empty(y.shape[0] if need_y else 0, y.shape[1], dtype=wide),
        x.new_empty(1 if need_scale else 0, dtype=wide),
        x.new_empty(1 if need_bias else 0, dtype=wide),
    )


@torch.library.custom_op("llm2clip_kernels::sigmoid_loss_backward", mutates_args=())
def _summed_backward(
    g: Tensor,
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    dx: Tensor,
    dy: Tensor,
    dscale: Tensor,
    dbias: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        (dx * g).to(x.dtype),
        (dy * g).to(y.dtype),
        (dscale * g).to(scale.dtype),
        (dbias * g).to(bias.dtype),
    )


@_summed_backward.register_fake
def _(
    g: Tensor,
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    dx: Tensor,
    dy: Tensor,
    dscale: Tensor,
    dbias: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(dx, dtype=x.dtype),
        torch.empty_like(dy, dtype=y.dtype),
        torch.empty_like(dscale, dtype=scale.dtype),
        torch.empty_like(dbias, dtype=bias.dtype),
    )


def _summed_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    # x and y too: the backward is then an op of theirs, and differentiating it again raises instead of being wrong
    ctx.save_for_backward(*inputs[:4], *output[1:])
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])


def _summed_autograd(ctx: Any, g: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if g is None:
        return (None,) * 11
    x, y, scale, bias, dx, dy, dscale, dbias = ctx.saved_tensors
    got = torch.ops.llm2clip_kernels.sigmoid_loss_backward(g, x, y, scale, bias, dx, dy, dscale, dbias)
    need_x, need_y, need_scale, need_bias = ctx.needs_input_grad[:4]
    return (
        got[0] if need_x else None,
        got[1] if need_y else None,
        got[2].reshape(()) if need_scale else None,
        got[3].reshape(()) if need_bias else None,
        *((None,) * 7),
    )


_summed.register_autograd(_summed_autograd, setup_context=_summed_context)


@torch.library.custom_op("llm2clip_kernels::sigmoid_loss_rows", mutates_args=())
def _rows(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    x_groups: Tensor,
    y_groups: Tensor,
    diagonal: int,
) -> Tensor:
    return compute(x, y, scale, bias, x_groups, y_groups, diagonal, None, (False,) * 4)[0]


@_rows.register_fake
def _(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    x_groups: Tensor,
    y_groups: Tensor,
    diagonal: int,
) -> Tensor:
    return x.new_empty(x.shape[0], dtype=accumulator(x.dtype))


@torch.library.custom_op("llm2clip_kernels::sigmoid_loss_rows_backward", mutates_args=())
def _rows_backward(
    g: Tensor,
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    x_groups: Tensor,
    y_groups: Tensor,
    diagonal: int,
    need_x: bool,
    need_y: bool,
    need_scale: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    needs = (need_x, need_y, need_scale, need_bias)
    _, dx, dy, dscale, dbias = compute(x, y, scale, bias, x_groups, y_groups, diagonal, g, needs)
    return dx.to(x.dtype), dy.to(y.dtype), dscale.to(scale.dtype), dbias.to(bias.dtype)


@_rows_backward.register_fake
def _(
    g: Tensor,
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    x_groups: Tensor,
    y_groups: Tensor,
    diagonal: int,
    need_x: bool,
    need_y: bool,
    need_scale: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape[0] if need_x else 0, x.shape[1]),
        y.new_empty(y.shape[0] if need_y else 0, y.shape[1]),
        scale.new_empty(1 if need_scale else 0),
        bias.new_empty(1 if need_bias else 0),
    )


def _rows_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.diagonal = inputs
    ctx.save_for_backward(*tensors)


def _rows_autograd(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad[:4]
    got = torch.ops.llm2clip_kernels.sigmoid_loss_rows_backward(g, *ctx.saved_tensors, ctx.diagonal, *needs)
    return (
        got[0] if needs[0] else None,
        got[1] if needs[1] else None,
        got[2].reshape(()) if needs[2] else None,
        got[3].reshape(()) if needs[3] else None,
        None, None, None,
    )  # fmt: skip


_rows.register_autograd(_rows_autograd, setup_context=_rows_context)


@follows_autocast
def sigmoid_terms(
    x: Tensor,
    y: Tensor,
    scale: Tensor | float,
    bias: Tensor | float,
    *,
    x_groups: Tensor | None = None,
    y_groups: Tensor | None = None,
    diagonal: int = 0,
    rows: bool = False,
) -> Tensor:
    """The sigmoid loss of x against y on one device.

    Args:
        x: (M, D) fp32, bf16, fp16 or fp64, any strides.
        y: (N, D), dtype and device of x.
        scale, bias: the logit is scale · x·y + bias; numbers, or 0-dim or 1-element tensors, which then get
            gradients.
        x_groups, y_groups: (M,) and (N,) integers; pairs with equal ids are positive, ids below 0 equal
            nothing. None: the pairs (i, diagonal + i) are positive.
        diagonal: column of row 0's positive; columns outside [0, N) are nobody's, so N leaves only negatives.
        rows: return the losses of the rows.

    Returns:
        Their sum (), whose gradients are made at once: 3 matmuls, 1 where no gradient is needed. With
        `rows`, (M,), whose gradients are made in the backward: 4 matmuls. fp32 (fp64 for fp64).

    Up to one and a half times LLM2CLIP_SMALL_PAIRS pairs plain torch serves.

    Raises:
        TypeError, ValueError: inputs that do not fit.
    """
    check_pair(x, y, "sigmoid_loss")
    groups = check_groups(x_groups, y_groups, x, y, "sigmoid_loss")
    factor = scale_tensor(scale, x, "sigmoid_loss")
    offset = scale_tensor(bias, x, "sigmoid_loss", "bias")
    if x.shape[0] * y.shape[0] <= _SMALL_PAIRS:
        losses = plain.forward(x, y, factor, offset, *groups, diagonal)
        return losses if rows else losses.sum()
    if rows:
        return _rows(x, y, factor, offset, *groups, diagonal)
    needs = [torch.is_grad_enabled() and t.requires_grad for t in (x, y, factor, offset)]
    return _summed(x, y, factor, offset, *groups, diagonal, *needs)[0]


__all__ = ["compute", "sigmoid_terms"]
