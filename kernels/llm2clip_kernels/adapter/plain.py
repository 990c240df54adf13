"""The adapter's row operations in plain torch, fp32 inside (fp64 for fp64): every device and dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import accumulator
from ..dropout import keep_mask


def _wide(t: Tensor) -> Tensor:
    return t.to(accumulator(t.dtype))


def _drop(t: Tensor, seed: Tensor, p: float) -> Tensor:
    if p == 0:
        return t
    kept = keep_mask(seed, 0, t.shape[0], t.shape[1], p)
    return torch.where(kept, t * (1 / (1 - p) if p < 1 else 0.0), t.new_zeros(()))


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Returns LN(x) (N, D) in `dtype`. x (N, D); weight and bias (D,) in the accumulator's dtype, or empty."""
    w, b = (t if t.numel() else None for t in (weight, bias))
    return F.layer_norm(_wide(x), x.shape[1:], w, b, eps).to(dtype)


def layer_norm_backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dh: Tensor,
    dy: Tensor,
    keep_output: bool,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
    need_dy_sum: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns dx = LayerNorm's gradient + dy (N, D) like x, and the sums over rows dweight, dbias, Σ dy (D,).

    Args:
        x: (N, D) input of LayerNorm.
        weight: (D,) or empty.
        bias: (D,) or empty.
        eps: of LayerNorm.
        dh: (N, D) gradient of LayerNorm's output; where `keep_output` it is replaced by that output.
        dy: (N, D) gradient of the residual path, like x, or empty.
        keep_output: as said.
        need_x: what is not needed is returned empty.
        need_weight: see need_x.
        need_bias: see need_x.
        need_dy_sum: see need_x.
    """
    wide = _wide(x)
    centred = wide - wide.mean(1, keepdim=True)
    rstd = (centred.square().mean(1, keepdim=True) + eps).rsqrt()
    unit = centred * rstd
    g = dh.to(wide.dtype)
    dweight = (g * unit).sum(0) if need_weight else wide.new_empty(0)
    dbias = g.sum(0) if need_bias else wide.new_empty(0)
    dx = x.new_empty(0, x.shape[1])
    if need_x:
        scaled = g * weight if weight.numel() else g
        inner = scaled - scaled.mean(1, keepdim=True) - unit * (scaled * unit).mean(1, keepdim=True)
        dx = (inner * rstd + (dy.to(wide.dtype) if dy.numel() else 0.0)).to(x.dtype)
    if keep_output:
        output = unit * weight if weight.numel() else unit
        dh.copy_(output + bias if bias.numel() else output)
    dy_sum = dy.sum(0, dtype=wide.dtype) if need_dy_sum and dy.numel() else wide.new_empty(0)
    return dx, dweight, dbias, dy_sum


def bias_gelu(pre: Tensor, bias: Tensor, seed: Tensor, p: float, out: Tensor) -> None:
    """out = drop(gelu(pre + bias)), (N, K); bias (K,) or empty; out may be pre; seed: one int64 where p > 0."""
    v = _wide(pre) + bias if bias.numel() else _wide(pre)
    out.copy_(_drop(F.gelu(v), seed, p))


def bias_gelu_backward(
    pre: Tensor, bias: Tensor, seed: Tensor, p: float, gradient: Tensor, keep_output: bool, need_bias: bool
) -> tuple[Tensor, Tensor]:
    """Replaces `gradient` (N, K), of `bias_gelu`'s output, by that of pre.

    Returns:
        That output again (N, K), (0, K) unless `keep_output`; and the gradient of bias (K,), (0,) unless asked.
    """
    v = _wide(pre) + bias if bias.numel() else _wide(pre)
    g = torch.ops.aten.gelu_backward(_drop(gradient.to(v.dtype), seed, p), v)
    gradient.copy_(g)
    output = _drop(F.gelu(v), seed, p).to(pre.dtype) if keep_output else pre.new_empty(0, pre.shape[1])
    return output, g.sum(0) if need_bias else v.new_empty(0)
