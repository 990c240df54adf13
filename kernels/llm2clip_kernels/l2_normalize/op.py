"""`l2_normalize`: schema, checks, autograd, and the one place that picks the implementation.

    y = x / max(‖x‖, eps)          dx = (g - y <g, y>) / ‖x‖,  and g / eps where ‖x‖ < eps

One read of x and one write of y, in any two dtypes, with sums in fp32. Saved for the backward: the norms, and y
where it has the dtype of x (whatever consumes y keeps it anyway), else x, which alone is exact enough.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backend
from ..checks import FLOATS, accumulator, native_rows
from . import plain


@torch.library.custom_op("llm2clip_kernels::l2_normalize", mutates_args=())
def _forward(x: Tensor, dtype: torch.dtype, eps: float) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    chosen = backend.choose_rows(x.device, x.dtype, dtype)
    if chosen == "native":
        y, norm = torch.ops.llm2clip_native.l2_normalize_forward(native_rows(x), eps, dtype == torch.bfloat16)
        return y.to(dtype), norm
    if chosen == "triton":
        from . import kernel

        return kernel.forward(x, dtype, eps)
    return plain.forward(x, dtype, eps)


@_forward.register_fake
def _(x: Tensor, dtype: torch.dtype, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape[0], dtype=accumulator(x.dtype))


@torch.library.custom_op("llm2clip_kernels::l2_normalize_backward", mutates_args=())
def _backward(
    g: Tensor, saved: Tensor, norm: Tensor, eps: float, saved_is_unit: bool, dtype: torch.dtype
) -> Tensor:
    g, saved = g.contiguous(), saved.contiguous()
    chosen = backend.choose_rows(g.device, g.dtype, saved.dtype, dtype)
    if chosen == "native":
        dx: Tensor = torch.ops.llm2clip_native.l2_normalize_backward(
            native_rows(g), native_rows(saved), norm, eps, saved_is_unit, dtype == torch.bfloat16
        )
        return dx.to(dtype)
    if chosen == "triton":
        from . import kernel

        return kernel.backward(g, saved, norm, eps, saved_is_unit, dtype)
    return plain.backward(g, saved, norm, eps, saved_is_unit, dtype)


@_backward.register_fake
def _(g: Tensor, saved: Tensor, norm: Tensor, eps: float, saved_is_unit: bool, dtype: torch.dtype) -> Tensor:
    return g.new_empty(g.shape, dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, dtype, ctx.eps = inputs
    y, norm = output
    ctx.saved_is_unit, ctx.dtype = x.dtype == dtype, x.dtype
    ctx.save_for_backward(y if ctx.saved_is_unit else x, norm)
    ctx.mark_non_differentiable(norm)
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, g: Tensor | None, _: None) -> tuple[Tensor | None, None, None]:
    if g is None:
        return None, None, None
    saved, norm = ctx.saved_tensors
    dx = torch.ops.llm2clip_kernels.l2_normalize_backward(
        g, saved, norm, ctx.eps, ctx.saved_is_unit, ctx.dtype
    )
    return dx, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


def l2_normalize(x: Tensor, *, dtype: torch.dtype | None = None, eps: float = 1e-12) -> Tensor:
    """Scales every row to unit length, as torch.nn.functional.normalize does, and casts in the same pass.

    Differentiable, once. Sums are in fp32 (fp64 for fp64), so that half precision rounds only the result, and a
    zero row of fp16 stays zero, where torch's eps underflows and gives NaN. Autocast leaves it as it is: the
    result has the dtype asked for.

    Args:
        x: (..., D) fp32, bf16, fp16 or fp64, any strides.
        dtype: of the result; None for that of x.
        eps: smallest length that is divided by; a shorter row, the zero row too, is divided by it, and its
            gradient is g / eps.

    Returns:
        (..., D) of unit length, in `dtype`.

    Raises:
        TypeError, ValueError: not a floating tensor, no last dimension, a dtype or eps that cannot be.

    Examples:
        >>> text = l2_normalize(features, dtype=torch.bfloat16)
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"l2_normalize: x must be a tensor, got {type(x).__name__}")
    dtype = x.dtype if dtype is None else dtype
    for name, kind in (("x", x.dtype), ("dtype", dtype)):
        if kind not in FLOATS:
            raise TypeError(f"l2_normalize: {name} must be fp32, bf16, fp16 or fp64, got {kind}")
    if x.dim() == 0:
        raise ValueError("l2_normalize: x must have a last dimension to normalise, got a 0-dim tensor")
    if not eps > 0:
        raise ValueError(f"l2_normalize: eps must be greater than 0, got {eps}")
    y, _ = _forward(x.reshape(-1, x.shape[-1]), dtype, float(eps))
    return y.view(x.shape)


__all__ = ["l2_normalize"]
