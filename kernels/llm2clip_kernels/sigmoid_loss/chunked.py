"""The sigmoid loss by row stripes and torch's own GEMM: every device, every dtype, fp64 included.

Always available, and the honest baseline of the fused kernels: 3 passes, but several sweeps over each stripe.
Never asks the device for a value.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import accumulator
from ..stripes import add_stripe_gradients, gradient_unit, matmul, stripe_rows, widen


def gradient_lift(dtype: torch.dtype) -> float:
    """Factor on G = dL/dlogit, at most one in size, while it is held in `dtype`.

    fp16 ends at 6e-8, and at SigLIP's first bias of -10 every negative's G is 5e-5.
    """
    return 1024.0 if dtype == torch.float16 else 1.0


def compute(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    x_groups: Tensor,
    y_groups: Tensor,
    diagonal: int,
    weight: Tensor | None,
    need_x: bool,
    need_y: bool,
    need_scale: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Losses of the rows and the gradients of Σ_i weight_i · loss_i.

    Args:
        x, y: (M, D) and (N, D).
        scale, bias: () in the accumulator's dtype.
        x_groups, y_groups: (M,) and (N,) int64 ids of positive pairs, or both empty.
        diagonal: without ids, column of row 0's positive; columns outside [0, N) are nobody's.
        weight: (M,) or None for one.

    Returns:
        loss (M,), dx, dy, dscale, dbias in the accumulator's dtype; (0, D) and (0,) where not needed.
    """
    lift = gradient_lift(widen(x[:1]).dtype)
    x, y = widen(x), widen(y)
    wide = accumulator(x.dtype)
    m, n = x.shape[0], y.shape[0]
    unit = torch.ones((), dtype=wide, device=x.device) if weight is None else gradient_unit(weight).to(wide)
    loss = x.new_empty(m, dtype=wide)
    dx = x.new_empty(m if need_x else 0, x.shape[1], dtype=wide)
    dy = x.new_empty(n if need_y else 0, x.shape[1], dtype=wide)
    dscale, dbias = (x.new_zeros(1 if need else 0, dtype=wide) for need in (need_scale, need_bias))
    step = stripe_rows(n, m)
    for start in range(0, m, step):
        stop = min(start + step, m)
        dots = matmul(x[start:stop], y.T)
        z = dots * scale + bias
        positive = None
        if x_groups.numel():
            positive = (x_groups[start:stop, None] == y_groups) & (y_groups >= 0)
        _flip(z, positive, diagonal + start)
        loss[start:stop] = F.logsigmoid(-z).sum(1).neg_()
        if not (need_x or need_y or need_scale or need_bias):
            continue
        g = _flip(z.sigmoid_(), positive, diagonal + start)
        if weight is not None:
            g *= (weight[start:stop] / unit)[:, None]
        if need_scale:
            dscale += (g * dots).sum()
        if need_bias:
            dbias += g.sum()
        dy = add_stripe_gradients(g.mul_(lift).to(x.dtype), start, x, y, dx, dy)
    return loss, dx.mul_(scale * unit / lift), dy.mul_(scale * unit / lift), dscale * unit, dbias * unit


def _flip(values: Tensor, positive: Tensor | None, diagonal: int) -> Tensor:
    """Negates the positive pairs in place: a positive of logit t is a negative of logit -t."""
    if positive is None:
        values.diagonal(diagonal).neg_()
        return values
    return torch.where(positive, -values, values, out=values)
