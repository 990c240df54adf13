"""The adapter's row operations by whichever implementation serves the tensors; arguments as in `plain`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backend
from ..checks import accumulator, native_rows
from . import plain


def _implementation(chosen: backend.Backend, cols: int) -> Any:
    if chosen == "triton":
        from . import kernel

        if cols <= kernel.LARGEST_ROW:
            return kernel
    return plain


def parameter(t: Tensor | None, like: Tensor) -> Tensor:
    """Returns a bias or LayerNorm parameter as the row operations read it: in the accumulator's dtype, or empty."""
    wide = accumulator(like.dtype)
    return like.new_empty(0, dtype=wide) if t is None else t.to(wide).contiguous()


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """As `plain.layer_norm`."""
    chosen = backend.choose_rows(x.device, x.dtype, dtype)
    if chosen == "native":
        h: Tensor = torch.ops.llm2clip_native.layer_norm(
            native_rows(x), weight, bias, eps, dtype == torch.bfloat16
        )
        return h.to(dtype)
    out: Tensor = _implementation(chosen, x.shape[1]).layer_norm(x, weight, bias, eps, dtype)
    return out


def layer_norm_backward(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dh: Tensor, dy: Tensor, *flags: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `plain.layer_norm_backward`."""
    chosen = backend.choose_rows(x.device, x.dtype, dh.dtype)
    if chosen != "native":
        sums: tuple[Tensor, Tensor, Tensor, Tensor]
        sums = _implementation(chosen, x.shape[1]).layer_norm_backward(x, weight, bias, eps, dh, dy, *flags)
        return sums
    gradient = native_rows(dh)
    dx, dweight, dbias, dy_sum = torch.ops.llm2clip_native.layer_norm_backward(
        native_rows(x), weight, bias, eps, gradient, native_rows(dy), *flags
    )
    if gradient is not dh:
        dh.copy_(gradient)
    return dx.to(x.dtype), dweight, dbias, dy_sum


def bias_gelu(pre: Tensor, bias: Tensor, seed: Tensor, p: float, out: Tensor) -> None:
    """As `plain.bias_gelu`."""
    chosen = backend.choose_rows(pre.device, pre.dtype)
    if chosen != "native":
        _implementation(chosen, 1).bias_gelu(pre, bias, seed, p, out)
    elif pre.dtype == torch.float16:
        wide = pre.float()
        torch.ops.llm2clip_native.bias_gelu(wide, bias, seed, p, wide)
        out.copy_(wide)
    else:
        torch.ops.llm2clip_native.bias_gelu(pre, bias, seed, p, out)


def bias_gelu_backward(
    pre: Tensor, bias: Tensor, seed: Tensor, p: float, gradient: Tensor, keep_output: bool, need_bias: bool
) -> tuple[Tensor, Tensor]:
    """As `plain.bias_gelu_backward`."""
    chosen = backend.choose_rows(pre.device, pre.dtype)
    if chosen != "native":
        both: tuple[Tensor, Tensor]
        both = _implementation(chosen, 1).bias_gelu_backward(
            pre, bias, seed, p, gradient, keep_output, need_bias
        )
        return both
    wide = native_rows(gradient)
    output, dbias = torch.ops.llm2clip_native.bias_gelu_backward(
        native_rows(pre), bias, seed, p, wide, keep_output, need_bias
    )
    if wide is not gradient:
        gradient.copy_(wide)
    return output.to(pre.dtype), dbias
