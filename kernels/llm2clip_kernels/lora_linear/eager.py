"""What `lora_linear` does forward and backward, and its autograd.Functions for eager mode.

In eager mode an autograd.Function stands where the custom op stands under torch.compile: the dispatcher's way
through a Python op costs as much as a small product.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import backend
from . import products

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def _no_autocast(*tensors: Tensor | None) -> AbstractContextManager[Any]:
    # dtypes are settled before the op; a backward pass run inside autocast must not change them. Entering the
    # context costs tens of microseconds, and nothing changes where everything has autocast's dtype already
    kind = next(t.device.type for t in tensors if t is not None)
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        if any(t is not None and t.dtype != dtype for t in tensors):
            return torch.autocast(kind, enabled=False)
    return nullcontext()


def run(
    y: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    seed: Tensor | None,
    scaling: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """y (T, N) and u = drop(x) Aᵀ (T, R). Adds to the given y in place, or makes the base product itself."""
    with _no_autocast(weight, a):
        factor = products.factor_of(scaling, dropout_p)
        if weight is None:
            assert y is not None
            u = products.down(x, a, seed, dropout_p)
            return products.add_product_(y, u, b, factor), u
        cast = x.to(weight.dtype)
        u = products.down(cast if a.dtype == weight.dtype else x, a, seed, dropout_p)
        if a.dtype == weight.dtype and backend.choose(x.device, weight.dtype) == "triton":
            from . import kernel

            return kernel.forward(cast, weight, bias, u, b.t() * factor), u
        y = torch.mm(cast, weight.t()) if bias is None else torch.addmm(bias, cast, weight.t())
        return products.add_product_(y, u, b, factor), u


def run_backward(
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
) -> Gradients:
    """Gradients of x, weight, bias, a and b; None where not needed."""
    with _no_autocast(dy, weight, a):
        dx = torch.mm(dy, weight) if need_x and weight is not None else None
        dx, da, db = products.backward(dy, x, a, b, u, dx, seed, scaling, dropout_p, need_x, need_a, need_b)
        dweight = torch.mm(dy.t(), x.to(dy.dtype)) if need_weight else None
        return None if dx is None else dx.to(x.dtype), dweight, dy.sum(0) if need_bias else None, da, db


class LoraLinear(torch.autograd.Function):
    """(x (T, K), weight, bias, a, b, seed, scaling, dropout_p) -> y (T, N)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
        a, b, seed, ctx.scaling, ctx.dropout_p = rest
        y, u = run(None, x, weight, bias, *rest)
        ctx.save_for_backward(x, weight, a, b, u, seed)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight, a, b, u, seed = ctx.saved_tensors
        needs = ctx.needs_input_grad[:5]
        found = run_backward(dy, x, weight, a, b, u, seed, ctx.scaling, ctx.dropout_p, *needs)
        return *found, None, None, None


class LoraAdd(torch.autograd.Function):
    """(y (..., N), x (T, K), a, b, seed, scaling, dropout_p) -> y, added to in place."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, *rest: Any) -> Tensor:
        a, b, seed, ctx.scaling, ctx.dropout_p = rest
        _, u = run(y.view(-1, y.shape[-1]), x, None, None, *rest)
        ctx.mark_dirty(y)
        ctx.save_for_backward(x, a, b, u, seed)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, a, b, u, seed = ctx.saved_tensors
        _, need_x, need_a, need_b = ctx.needs_input_grad[:4]
        dx, _, _, da, db = run_backward(
            dy.reshape(-1, dy.shape[-1]),
            x,
            None,
            a,
            b,
            u,
            seed,
            ctx.scaling,
            ctx.dropout_p,
            need_x,
            False,
            False,
            need_a,
            need_b,
        )
        return dy, dx, da, db, None, None, None
