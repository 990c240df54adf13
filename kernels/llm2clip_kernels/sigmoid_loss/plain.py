"""The sigmoid loss with the whole matrix in memory, for batches so small that this is the fastest way."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import accumulator

# above it softplus(z) is z to the last bit, in fp64 too
_LINEAR = 40.0


def forward(
    x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, x_groups: Tensor, y_groups: Tensor, diagonal: int
) -> Tensor:
    """Returns the losses of the rows (M,), fp32 (fp64 for fp64); autograd differentiates it.

    Arguments as in `chunked.compute`. Half-precision inputs are widened: the products are those the kernels
    accumulate.
    """
    wide = accumulator(x.dtype)
    z = (x.to(wide) * scale) @ y.to(wide).T + bias
    # a positive of logit t is a negative of logit -t
    if x_groups.numel():
        positive = (x_groups[:, None] == y_groups) & (y_groups >= 0)
        z = torch.where(positive, -z, z)
    else:
        z.diagonal(diagonal).neg_()
    return F.softplus(z, threshold=_LINEAR).sum(1)
