"""`lora_linear` and `lora_add`: schema, fake, autograd of the custom ops, and the choice of the way taken.

    y = x Wᵀ + bias + s·(drop(x) Aᵀ) Bᵀ

Kept for the backward pass: x, xAᵀ (T, R), the parameters, and the seed of the dropout. torch.compile sees the
custom ops here, eager mode takes the autograd.Functions of `eager`, and few rows go through torch's own
differentiable ops, where memory is no question and calls are what costs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _env
from ..dropout import new_seed
from . import products
from .checks import check_add, check_linear, check_seed, settle
from .eager import LoraAdd, LoraLinear, run, run_backward

# numbers in x and y below which a hand-written backward pass costs more than it saves
_SMALL = 2**19


@torch.library.custom_op("llm2clip_kernels::lora_linear", mutates_args=())
def _linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    seed: Tensor | None,
    scaling: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    return run(None, x, weight, bias, a, b, seed, scaling, dropout_p)


@_linear.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    seed: Tensor | None,
    scaling: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    return weight.new_empty(x.shape[0], weight.shape[0]), a.new_empty(x.shape[0], a.shape[0])


@torch.library.custom_op("llm2clip_kernels::lora_add", mutates_args=())
def _add(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, seed: Tensor | None, scaling: float, dropout_p: float
) -> tuple[Tensor, Tensor]:
    # a compiled graph has no tensors of the caller's to write to
    y = y.clone(memory_format=torch.contiguous_format)
    return run(y, x, None, None, a, b, seed, scaling, dropout_p)


@_add.register_fake
def _(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, seed: Tensor | None, scaling: float, dropout_p: float
) -> tuple[Tensor, Tensor]:
    return y.new_empty(y.shape), a.new_empty(x.shape[0], a.shape[0])


@torch.library.custom_op("llm2clip_kernels::lora_linear_backward", mutates_args=())
def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    a: Tensor,
    b: Tensor,
    u: Tensor,
    seed: Tensor | None,
    scaling: float,
    dropout_p: float,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
    need_a: bool,
    need_b: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    needs = (need_x, need_weight, need_bias, need_a, need_b)
    found = run_backward(dy, x, weight, a, b, u, seed, scaling, dropout_p, *needs)
    dx, dweight, dbias, da, db = (dy.new_empty(0) if g is None else g for g in found)
    return dx, dweight, dbias, da, db


@_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    a: Tensor,
    b: Tensor,
    u: Tensor,
    seed: Tensor | None,
    scaling: float,
    dropout_p: float,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
    need_a: bool,
    need_b: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    none = dy.new_empty(0)
    return (
        x.new_empty(x.shape) if need_x else none,
        dy.new_empty(dy.shape[1], x.shape[1]) if need_weight else dy.new_empty(0),
        dy.new_empty(dy.shape[1]) if need_bias else dy.new_empty(0),
        a.new_empty(a.shape) if need_a else dy.new_empty(0),
        b.new_empty(b.shape) if need_b else dy.new_empty(0),
    )


def _setup_linear(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, a, b, seed, ctx.scaling, ctx.dropout_p = inputs
    ctx.save_for_backward(x, weight, a, b, output[1], seed)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _setup_add(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, x, a, b, seed, ctx.scaling, ctx.dropout_p = inputs
    ctx.save_for_backward(x, a, b, output[1], seed)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _linear_gradients(ctx: Any, dy: Tensor | None, _: Tensor | None) -> Any:
    needs = ctx.needs_input_grad[:5]
    if dy is None:
        return (None,) * 8
    found = _backward(dy, *ctx.saved_tensors, ctx.scaling, ctx.dropout_p, *needs)
    return *(g if need else None for g, need in zip(found, needs, strict=True)), None, None, None


def _add_gradients(ctx: Any, dy: Tensor | None, _: Tensor | None) -> Any:
    _, need_x, need_a, need_b = ctx.needs_input_grad[:4]
    if dy is None:
        return (None,) * 7
    x, a, b, u, seed = ctx.saved_tensors
    dx, _, _, da, db = _backward(
        dy, x, None, a, b, u, seed, ctx.scaling, ctx.dropout_p, need_x, False, False, need_a, need_b
    )
    found = ((dx, need_x), (da, need_a), (db, need_b))
    return dy, *(g if need else None for g, need in found), None, None, None


_linear.register_autograd(_linear_gradients, setup_context=_setup_linear)
_add.register_autograd(_add_gradients, setup_context=_setup_add)


def _small(x: Tensor, out_features: int, low: torch.dtype, dropout_p: float) -> bool:
    if torch.compiler.is_compiling() or _env.forced_backend() != "auto":
        return False
    # casts made again in the backward pass raise its price, masks made again are cheaper than masks kept
    limit = _SMALL // 4 if dropout_p > 0 else _SMALL if x.dtype == low else 2 * _SMALL
    return x.numel() + x.numel() // x.shape[-1] * out_features < limit


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """A linear layer with a low-rank update: x Wᵀ + bias + s·(drop(x) Aᵀ) Bᵀ in one op.

    Differentiable in every tensor; nothing is computed for inputs that need no gradient. Beside x and the
    parameters only T·R numbers are kept for the backward pass. Under autocast the parameters are cast to its
    dtype, as autocast does for a linear layer, and the result has it. Without autocast `lora_a` and `lora_b`
    may be of another dtype than x (fp32 adapters on a bf16 model): the low-rank product then runs in theirs
    and is added before the result is rounded.

    Args:
        x: (..., K) fp32, bf16, fp16 or fp64, any strides.
        weight: (N, K), dtype of x (any under autocast).
        bias: (N,), dtype of weight, or None.
        lora_a: (R, K), R >= 1.
        lora_b: (N, R), dtype of lora_a.
        scaling: the multiplier s (peft's `scaling`: alpha / R, or alpha / sqrt(R)).
        dropout_p: share of the entries of x that the low-rank path does not see; the rest is divided by
            1 - dropout_p. 0 in evaluation.
        seed: () int64 on x's device that determines the dropout mask; None draws one from torch's generator,
            so that `torch.manual_seed` and gradient checkpointing reproduce it. The mask differs from
            torch.nn.Dropout's under the same generator state; its distribution is the same.

    Returns:
        (..., N), dtype of x (autocast's dtype under autocast).

    Raises:
        TypeError, ValueError: shapes, dtypes or devices that do not fit, with what was expected.

    Examples:
        >>> y = lora_linear(x, base.weight, base.bias, lora_a, lora_b, alpha / rank)
    """
    check_linear(x, weight, bias, lora_a, lora_b, dropout_p)
    check_seed("lora_linear", seed, x)
    weight, lora_a, lora_b = (settle(t, x) for t in (weight, lora_a, lora_b))
    if bias is not None:
        bias = settle(bias, x)
    if dropout_p == 0:
        seed = None
    elif seed is None:
        seed = new_seed(x.device)
    if _small(x, weight.shape[0], lora_a.dtype, dropout_p):
        cast = x.to(weight.dtype)
        y = F.linear(cast, weight, bias)
        return products.composed(
            y, cast if lora_a.dtype == weight.dtype else x, lora_a, lora_b, seed, scaling, dropout_p
        )
    rows = x.reshape(-1, x.shape[-1])
    args = (rows, weight, bias, lora_a, lora_b, seed, float(scaling), float(dropout_p))
    y = _linear(*args)[0] if torch.compiler.is_compiling() else LoraLinear.apply(*args)
    return y.reshape(*x.shape[:-1], weight.shape[0])


def lora_add(
    y: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """y + s·(drop(x) Aᵀ) Bᵀ, written into y where autograd lets it: for base layers that are not plain matrices.

    The host library makes y with its own product (8-bit, 4-bit, transposed), this op adds the low-rank part.

    Args:
        y: (..., N), the base layer's output; do not use it afterwards.
        x: (..., K), the base layer's input, any float dtype.
        lora_a, lora_b, scaling, dropout_p, seed: as in `lora_linear`.

    Returns:
        (..., N), dtype of y.

    Raises:
        TypeError, ValueError: as `lora_linear`.
    """
    check_add(y, x, lora_a, lora_b, dropout_p)
    check_seed("lora_add", seed, x)
    lora_a, lora_b = settle(lora_a, x), settle(lora_b, x)
    if dropout_p == 0:
        seed = None
    elif seed is None:
        seed = new_seed(x.device)
    if _small(x, y.shape[-1], lora_a.dtype, dropout_p):
        return products.composed(y, x, lora_a, lora_b, seed, scaling, dropout_p)
    rows = x.reshape(-1, x.shape[-1])
    rest = (rows, lora_a, lora_b, seed, float(scaling), float(dropout_p))
    if torch.compiler.is_compiling():
        return _add(y.reshape(-1, y.shape[-1]), *rest)[0].reshape(y.shape)
    # a leaf with a gradient and a view of somebody's tensor must not be written to; nor may a view that a base
    # layer's own autograd.Function returns, in no graph itself, enter one by being written to
    differentiable = torch.is_grad_enabled() and any(t.requires_grad for t in (y, x, lora_a, lora_b))
    if differentiable and (y._is_view() or y.requires_grad and y.is_leaf) or not y.is_contiguous():
        y = y.clone(memory_format=torch.contiguous_format)
    added: Tensor = LoraAdd.apply(y, *rest)
    return added
