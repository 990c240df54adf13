"""`layer_norm_linear`: LN(x) Wᵀ + b that saves x alone. The adapter's last layer.

h = LN(x)     y = h Wᵀ + b          dh = dy W     dx = LN'(dh)     dW = dyᵀ h, with h made again
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..autocast import full_precision
from ..checks import accumulator
from . import rows
from .op import autocast_rows, autocast_weights, check_operands, nothing


@torch.library.custom_op("llm2clip_kernels::layer_norm_linear", mutates_args=())
def _forward(
    x: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    x = x.contiguous()
    with full_precision(x.device):
        h = rows.layer_norm(x, rows.parameter(ln_weight, x), rows.parameter(ln_bias, x), eps, weight.dtype)
        return F.linear(h, weight, None if bias is None else bias.to(weight.dtype))


@_forward.register_fake
def _(
    x: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    return weight.new_empty(x.shape[0], weight.shape[0])


@torch.library.custom_op("llm2clip_kernels::layer_norm_linear_backward", mutates_args=())
def _backward(
    dy: Tensor,
    x: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    weight: Tensor,
    eps: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    need_x, need_lw, need_lb, need_w, need_b = needs
    x, dy = x.contiguous(), dy.contiguous()
    lw, lb = rows.parameter(ln_weight, x), rows.parameter(ln_bias, x)
    dx, dlw, dlb, dw, db, no_residual = nothing(x, 6)
    with full_precision(x.device):
        if need_x or need_lw or need_lb:
            h = dy @ weight
            dx, dlw, dlb, _ = rows.layer_norm_backward(
                x, lw, lb, eps, h, no_residual, need_w, need_x, need_lw, need_lb, False
            )
            dx = dx if need_x else nothing(x, 1)[0]
        elif need_w:
            h = rows.layer_norm(x, lw, lb, eps, weight.dtype)
        if need_w:
            dw = dy.T @ h
        if need_b:
            db = dy.sum(0, dtype=accumulator(dy.dtype))
    return dx, dlw, dlb, dw, db


@_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    weight: Tensor,
    eps: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    shapes = [tuple(x.shape), (x.shape[1],), (x.shape[1],), tuple(weight.shape), (weight.shape[0],)]
    dtypes = {0: x.dtype, 3: weight.dtype}
    gradients = nothing(x, 5)
    for i, (need, shape) in enumerate(zip(needs, shapes, strict=True)):
        if need:
            gradients[i] = x.new_empty(shape, dtype=dtypes.get(i, accumulator(x.dtype)))
    dx, dlw, dlb, dw, db = gradients
    return dx, dlw, dlb, dw, db


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ln_weight, ln_bias, weight, bias, ctx.eps = inputs
    ctx.dtypes = [None if t is None else t.dtype for t in (x, ln_weight, ln_bias, weight, bias)]
    ctx.save_for_backward(x, ln_weight, ln_bias, weight)


def _autograd(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:5])
    gradients = torch.ops.llm2clip_kernels.layer_norm_linear_backward(dy, *ctx.saved_tensors, ctx.eps, needs)
    return (
        *(g.to(d) if need else None for g, need, d in zip(gradients, needs, ctx.dtypes, strict=True)),
        None,
    )


_forward.register_autograd(_autograd, setup_context=_setup_context)


def layer_norm_linear(
    x: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    *,
    eps: float = 1e-5,
) -> Tensor:
    """LN(x) Wᵀ + b, keeping x alone for the backward. Arithmetic, autocast and gradients as in `adapter_block`.

    Args:
        x: (..., D) fp32, bf16, fp16 or fp64.
        ln_weight: (D,) or None.
        ln_bias: (D,) or None.
        weight: (K, D); dtype of x, or half precision where x is fp32.
        bias: (K,) or None.
        eps: of LayerNorm.

    Returns:
        (..., K), dtype of the weight.

    Raises:
        TypeError, ValueError: shapes or dtypes that do not fit, with what was expected.
    """
    name = "layer_norm_linear"
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise ValueError(
            f"{name}: weight must be a matrix, got {getattr(weight, 'shape', type(weight).__name__)}"
        )
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: x must be a tensor, got {type(x).__name__}")
    (weight,) = autocast_weights(x, weight)
    x = autocast_rows(x, weight)
    out, width = weight.shape
    vectors = {"ln_weight": (ln_weight, width), "ln_bias": (ln_bias, width), "bias": (bias, out)}
    check_operands(name, x, {"weight": weight}, vectors)
    if x.shape[-1] != width:
        raise ValueError(
            f"{name}: x must be (..., {width}) for weight {tuple(weight.shape)}, got {tuple(x.shape)}"
        )
    y: Tensor = _forward(x.reshape(-1, width), ln_weight, ln_bias, weight, bias, float(eps))
    return y.view(*x.shape[:-1], out)


__all__ = ["layer_norm_linear"]
