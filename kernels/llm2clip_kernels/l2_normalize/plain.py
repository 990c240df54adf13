"""`l2_normalize` in plain torch, fp32 inside (fp64 for fp64): every device and dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import accumulator


def forward(x: Tensor, dtype: torch.dtype, eps: float) -> tuple[Tensor, Tensor]:
    """Returns y (N, D) in `dtype` and the norms (N,), fp32 or fp64. x (N, D)."""
    wide = x.to(accumulator(x.dtype))
    norm = torch.linalg.vector_norm(wide, dim=1)
    return (wide / norm.clamp_min(eps)[:, None]).to(dtype), norm


def backward(
    g: Tensor, saved: Tensor, norm: Tensor, eps: float, saved_is_unit: bool, dtype: torch.dtype
) -> Tensor:
    """Returns dx (N, D) in `dtype`. g (N, D); saved (N, D): y, or x where not `saved_is_unit`; norm (N,)."""
    g, unit = g.to(norm.dtype), saved.to(norm.dtype)
    length = norm.clamp_min(eps)[:, None]
    if not saved_is_unit:
        unit = unit / length
    # a constant norm below eps has no gradient
    along = (g * unit).sum(1).masked_fill(norm < eps, 0.0)[:, None]
    return ((g - unit * along) / length).to(dtype)
