"""Row stripes of a similarity matrix and torch's own GEMM on them: what the plain-torch backends share."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import accumulator

# of one stripe of logits; two or three of that size live at a time
STRIPE_BYTES = 16 * 2**20


def stripe_rows(columns: int, rows: int) -> int:
    """Returns how many rows of a (rows, columns) matrix of floats make a stripe of bounded size."""
    # a GEMM of fewer than 128 rows wastes more than the workspace saves
    return max(1, min(rows, max(128, STRIPE_BYTES // (4 * max(columns, 1)))))


def widen(t: Tensor) -> Tensor:
    """Half precision to fp32 where the device's GEMM cannot accumulate and return fp32 itself."""
    return t if t.is_cuda else t.to(accumulator(t.dtype))


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, (M, K) by (K, N), accumulated and returned in fp32 (fp64 for fp64)."""
    wide = accumulator(a.dtype)
    if a.dtype == wide:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=wide)
    return a.to(wide) @ b.to(wide)


def add_stripe_gradients(g: Tensor, start: int, x: Tensor, y: Tensor, dx: Tensor, dy: Tensor) -> Tensor:
    """Writes the stripe's rows of dx = G y, and returns dy with the stripe's share of Gᵀ x added.

    Args:
        g: (rows, N) stripe of G in x's dtype.
        start: number of its first row.
        x, y: (M, D) and (N, D).
        dx: (M, D), empty where x needs no gradient.
        dy: (N, D), empty where y needs no gradient; what it holds before the first stripe does not count.
    """
    stop = start + g.shape[0]
    if dx.numel():
        dx[start:stop] = matmul(g, y)
    if dy.numel():
        product = matmul(g.T, x[start:stop])
        dy = product if start == 0 else dy.add_(product)
    return dy


def gradient_unit(*gradients: Tensor) -> Tensor:
    """The largest magnitude among the gradients, 1 where that is zero or not finite; 0-dim.

    Divided out while G = dL/dS may be rounded to half precision: of size 1/N it would underflow in fp16.
    """
    unit = torch.stack([g.abs().amax() for g in gradients if g.numel()]).amax()
    return torch.where((unit > 0) & unit.isfinite(), unit, torch.ones_like(unit))


def left_out(x_groups: Tensor, y_groups: Tensor, start: int, stop: int, diagonal: int) -> Tensor | None:
    """Which pairs of rows [start, stop) with all columns share a group and are not a row's own positive.

    Args:
        x_groups, y_groups: (M,) and (N,) int64, or both empty.
        diagonal: column of row 0's positive, -1 for none.

    Returns:
        (stop - start, N) bool, or None where there are no groups.
    """
    if not x_groups.numel():
        return None
    mine = x_groups[start:stop, None]
    mask = (mine == y_groups) & (mine >= 0)
    if diagonal >= 0:
        mask.diagonal(diagonal + start).fill_(False)
    return mask
