"""`segment_mean` in plain torch, fp32 inside (fp64 for fp64): every device and dtype, without waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import accumulator
from ..l2_normalize import plain as l2


def _owners(start: Tensor, stop: Tensor, cu_seqlens: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """The segment of every token (T,) int64 and whether it lies in that segment's span (T,) bool."""
    token = torch.arange(tokens, device=start.device)
    edges = cu_seqlens[1:].contiguous()
    owner = torch.searchsorted(edges, token, right=True).clamp_max(len(edges) - 1)
    return owner, (token >= start[owner]) & (token < stop[owner])


def forward(
    hidden: Tensor, start: Tensor, stop: Tensor, cu_seqlens: Tensor, normalize: bool, eps: float
) -> tuple[Tensor, Tensor]:
    """Returns the means (B, H), fp32 or fp64, and their norms (B,) before normalising, (0,) without.

    hidden (T, H); rows [start_b, stop_b) of [cu_seqlens_b, cu_seqlens_b+1) make segment b; all int64.
    """
    wide = accumulator(hidden.dtype)
    _, inside = _owners(start, stop, cu_seqlens, hidden.shape[0])
    # left out by selecting: 0 * NaN would be NaN
    states = torch.where(inside[:, None], hidden.to(wide), hidden.new_zeros((), dtype=wide))
    # adds in order, unlike index_add on a GPU; unsafe: does not look at the offsets, which would wait for the device
    sums = torch.segment_reduce(states, "sum", offsets=cu_seqlens, axis=0, unsafe=True)
    mean = sums / (stop - start).to(wide)[:, None]
    if not normalize:
        return mean, mean.new_empty(0)
    return l2.forward(mean, wide, eps)


def backward(
    g: Tensor,
    unit: Tensor,
    norm: Tensor,
    start: Tensor,
    stop: Tensor,
    cu_seqlens: Tensor,
    tokens: int,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """Returns the gradient (T, H) of the token states. g (B, H); unit (B, H) and norm (B,) or empty."""
    if norm.numel():
        g = l2.backward(g, unit, norm, eps, True, g.dtype)
    g = g / (stop - start).to(g.dtype)[:, None]
    owner, inside = _owners(start, stop, cu_seqlens, tokens)
    return torch.where(inside[:, None], g[owner], g.new_zeros(())).to(dtype)
