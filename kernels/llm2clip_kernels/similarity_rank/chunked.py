"""Counting by row stripes and torch's own GEMM: every device, every dtype.

What the GEMM's rounding leaves open is looked up and decided in fp64; on a GPU that asks the device for the number
of such pairs, once a stripe.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import accumulator
from ..stripes import matmul, stripe_rows, widen
from .pairs import pair_scores


def norms(x: Tensor) -> Tensor:
    """Returns the norms of the rows, (rows,) fp64."""
    return torch.linalg.vector_norm(x, dim=1, dtype=torch.float64)


def rounding(dim: int) -> float:
    """Returns how far an fp64 product may be off, for rows of norm 1."""
    return (dim + 8) * 2.0**-52


def _unit(x: Tensor) -> float:
    """How far a product of torch's GEMM may be off, in any order of its sum, for rows of norm 1."""
    if x.dtype == torch.float64:
        return (x.shape[1] + 16) * 2.0**-53
    unit = (x.shape[1] + 16) * 2.0**-24 * 1.001
    if not x.is_cuda:
        return unit
    if x.dtype == torch.float32:
        # operands of TensorFloat32 have ten bits behind the point
        return unit + (2.0**-9 if torch.get_float32_matmul_precision() != "highest" else 0.0)
    # tensor cores truncate where they add
    return 4 * unit


def margins(tolerance: float, sizes: Tensor, dim: int) -> Tensor:
    """What two scores may differ by and still tie: the tolerance and fp64's rounding, for products of norms."""
    return tolerance + (rounding(dim) * sizes).nan_to_num(0.0, 0.0)


def quick_error(x: Tensor, x_norm: Tensor, y_norm: Tensor) -> tuple[Tensor, Tensor]:
    """Factors (M,) and (N,) of what each product of x yᵀ may be off by; inf where a sum may overflow."""
    wide = accumulator(x.dtype)
    limit = 1e37 if wide == torch.float32 else 1e300
    largest = torch.where(y_norm.isfinite(), y_norm, torch.zeros_like(y_norm)).amax()
    # 1e-38·√D: features below the smallest normal number may count as zero
    lost = 1.2e-38 * x.shape[1] ** 0.5
    unit = _unit(x)
    of_x = torch.where(x_norm * largest < limit, unit * x_norm + lost, torch.full_like(x_norm, torch.inf))
    return of_x.to(wide) * (1 + 1e-6), (y_norm + lost / unit).to(wide) * (1 + 1e-6)


def quick_thresholds(best: Tensor, tolerance: float, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """Thresholds as the GEMM's dtype has them, +inf where there is none, and what rounding them takes."""
    unit = 2.0**-22 if wide == torch.float32 else 2.0**-51
    slack = (best.abs() + tolerance) * unit + 1e-37
    none = best.isnan()
    return (
        torch.where(none, torch.full_like(best, torch.inf), best).to(wide),
        torch.where(none, torch.zeros_like(slack), slack).to(wide),
    )


def count(
    x: Tensor, y: Tensor, row_best: Tensor, col_best: Tensor, tolerance: float
) -> tuple[Tensor, Tensor]:
    """Returns (2, M) and (2, N) or (2, 0) int64: scores above the thresholds, and scores at them.

    x (M, D), y (N, D); row_best (M,), col_best (N,) or (0,) fp64, NaN where nothing is to be counted.
    """
    columns = col_best.numel() > 0
    wide = accumulator(x.dtype)
    x_norm, y_norm = norms(x), norms(y)
    x_error, y_error = quick_error(x, x_norm, y_norm)
    row_score, row_slack = quick_thresholds(row_best, tolerance, wide)
    col_score, col_slack = quick_thresholds(col_best, tolerance, wide)
    rows = torch.zeros(2, x.shape[0], dtype=torch.int64, device=x.device)
    cols = torch.zeros(2, y.shape[0] if columns else 0, dtype=torch.int64, device=x.device)
    wide_x, wide_y = widen(x), widen(y)
    step = stripe_rows(y.shape[0], x.shape[0])
    for start in range(0, x.shape[0], step):
        stripe = slice(start, min(start + step, x.shape[0]))
        dots = matmul(wide_x[stripe], wide_y.T)
        error = x_error[stripe, None] * y_error
        above, tied, undecided = _compare(
            dots, row_score[stripe, None], row_slack[stripe, None], error, tolerance
        )
        rows[:, stripe] += torch.stack([above.sum(1), tied.sum(1)])
        _decide(x, y, start, undecided, x_norm, y_norm, row_best, tolerance, rows, by_row=True)
        if columns:
            above, tied, undecided = _compare(dots, col_score, col_slack, error, tolerance)
            cols += torch.stack([above.sum(0), tied.sum(0)])
            _decide(x, y, start, undecided, x_norm, y_norm, col_best, tolerance, cols, by_row=False)
    return rows, cols


def _compare(
    dots: Tensor, score: Tensor, slack: Tensor, error: Tensor, tolerance: float
) -> tuple[Tensor, Tensor, Tensor]:
    difference, error = dots - score, error + slack
    above = difference > error + tolerance
    tied = difference.abs() < tolerance - error
    return above, tied, (above | tied | (difference < -(error + tolerance))).logical_not_()


def _decide(
    x: Tensor,
    y: Tensor,
    start: int,
    undecided: Tensor,
    x_norm: Tensor,
    y_norm: Tensor,
    best: Tensor,
    tolerance: float,
    counts: Tensor,
    *,
    by_row: bool,
) -> None:
    """Adds to `counts` the pairs that are not decided yet; by fp64."""
    # features with NaN have NaN scores, neither above nor tied
    undecided &= x_norm[start : start + undecided.shape[0], None].isnan().logical_not()
    undecided &= y_norm.isnan().logical_not()
    i, j = undecided.nonzero(as_tuple=True)
    if i.numel() == 0:
        return
    if 64 * i.numel() > undecided.numel():
        _decide_many(x, y, start, undecided, x_norm, y_norm, best, tolerance, counts, by_row=by_row)
        return
    i = i + start
    place = i if by_row else j
    scores = pair_scores(x, y, i, j)
    margin = margins(tolerance, x_norm[i] * y_norm[j], x.shape[1])
    above = scores > best[place] + margin
    tied = ~above & (scores >= best[place] - margin)
    counts[0].index_add_(0, place, above.long())
    counts[1].index_add_(0, place, tied.long())


def _decide_many(
    x: Tensor,
    y: Tensor,
    start: int,
    undecided: Tensor,
    x_norm: Tensor,
    y_norm: Tensor,
    best: Tensor,
    tolerance: float,
    counts: Tensor,
    *,
    by_row: bool,
) -> None:
    """The same where most pairs are open, as with features that hardly differ: by a GEMM in fp64."""
    rows = slice(start, start + undecided.shape[0])
    wide = x[rows].double()
    step = max(1, (1 << 20) // undecided.shape[0])
    for c in range(0, y.shape[0], step):
        cols = slice(c, min(c + step, y.shape[0]))
        scores = wide @ y[cols].double().T
        margin = margins(tolerance, x_norm[rows, None] * y_norm[cols], x.shape[1])
        threshold = best[rows, None] if by_row else best[cols]
        above = (scores > threshold + margin) & undecided[:, cols]
        tied = ~above & (scores >= threshold - margin) & undecided[:, cols]
        place, dim = (rows, 1) if by_row else (cols, 0)
        counts[0, place] += above.sum(dim)
        counts[1, place] += tied.sum(dim)
