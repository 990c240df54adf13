"""The k best columns by stripes with torch's own GEMM and torch.topk: every device, every dtype.

The GEMM's scores choose a few more than k; scored again in fp64, the best of these are the best of all if the last
chosen one lies below the k-th by more than the GEMM's rounding error. Rows where that cannot be said (many nearly
equal candidates) are scored whole in fp64. On a GPU that asks the device once whether there are any.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import accumulator
from ..similarity_rank.chunked import norms, quick_error
from ..similarity_rank.pairs import pair_scores
from ..stripes import STRIPE_BYTES, matmul, widen

# candidates beyond k, so that scores which only rounding tells apart are all there
_SPARE = 16


def update(
    x: Tensor,
    y: Tensor,
    scores: Tensor,
    indices: Tensor,
    first: int,
    x_groups: Tensor,
    y_groups: Tensor,
) -> tuple[Tensor, Tensor]:
    """Returns scores (M, k) fp64 and indices (M, k) after seeing y as the columns first, first + 1, ...

    x (M, D), y (N, D); x_groups (M,) and y_groups (N,), or both empty.
    """
    x_norm, y_norm = norms(x), norms(y)
    x_error, y_error = quick_error(x, x_norm, y_norm)
    # rows with NaN have no candidates
    error = x_error * torch.where(y_error.isnan(), torch.zeros_like(y_error), y_error).amax()
    height = min(x.shape[0], max(1, STRIPE_BYTES // (4 * 4096)))
    parts = []
    for start in range(0, x.shape[0], height):
        rows = slice(start, min(start + height, x.shape[0]))
        groups = x_groups[rows] if x_groups.numel() else x_groups
        found, columns = _best(
            x[rows], y, x_norm[rows], y_norm, error[rows], groups, y_groups, scores.shape[1]
        )
        columns = torch.where(columns >= 0, columns + first, columns)
        parts.append(
            ordered(
                torch.cat([scores[rows], found], dim=1),
                torch.cat([indices[rows], columns], dim=1),
                scores.shape[1],
            )
        )
    return torch.cat([s for s, _ in parts]), torch.cat([i for _, i in parts])


def _best(
    x: Tensor,
    y: Tensor,
    x_norm: Tensor,
    y_norm: Tensor,
    error: Tensor,
    x_groups: Tensor,
    y_groups: Tensor,
    k: int,
) -> tuple[Tensor, Tensor]:
    """The k best of these rows, exactly: scores (m, k) fp64 and columns (m, k), padded with -inf and -1."""
    m, n = x.shape[0], y.shape[0]

    def left_out(rows: Tensor, columns: Tensor) -> Tensor:
        gone = (x_norm[rows] * y_norm[columns]).isnan()
        if x_groups.numel():
            gone |= (x_groups[rows] == y_groups[columns]) & (x_groups[rows] >= 0)
        return gone

    every_row = torch.arange(m, device=x.device)[:, None]
    taken = min(k + _SPARE, n)
    quick = torch.full((m, 0), -torch.inf, dtype=accumulator(x.dtype), device=x.device)
    columns = torch.zeros((m, 0), dtype=torch.int64, device=x.device)
    wide_x = widen(x)
    width = max(taken, STRIPE_BYTES // (4 * m))
    for start in range(0, n, width):
        stripe = torch.arange(start, min(start + width, n), device=x.device)
        dots = matmul(wide_x, widen(y[start : start + width]).T)
        # an overflow on the way may have made a NaN of a score that is none
        dots = dots.nan_to_num_(torch.inf, torch.inf, -torch.inf)
        dots = dots.masked_fill_(left_out(every_row, stripe[None]), -torch.inf)
        some, place = torch.topk(dots, min(taken, len(stripe)), dim=1)
        quick, columns = torch.cat([quick, some], dim=1), torch.cat([columns, place + start], dim=1)
        if quick.shape[1] > taken:
            quick, place = torch.topk(quick, taken, dim=1)
            columns = columns.gather(1, place)
    rows = every_row.expand(m, taken)
    exact = pair_scores(x, y, rows.reshape(-1), columns.reshape(-1)).reshape(m, taken)
    columns = columns.masked_fill(left_out(rows, columns) | exact.isnan(), -1)
    exact, columns = ordered(exact.masked_fill(columns < 0, -torch.inf), columns, k)
    if taken == n:
        return exact, columns
    # nothing that was not chosen can reach the k-th, or nothing was left to choose
    sure = (quick[:, -1] + error).double() < exact[:, -1] - error.double()
    sure |= x_norm.isnan()
    doubtful = sure.logical_not().nonzero()[:, 0]
    for one in doubtful.split(max(1, (1 << 20) // n)):
        every = torch.arange(n, device=x.device).expand(len(one), n)
        whole = pair_scores(x, y, one.repeat_interleave(n), every.reshape(-1)).reshape(len(one), n)
        gone = left_out(one[:, None], every) | whole.isnan()
        exact[one], columns[one] = ordered(
            whole.masked_fill(gone, -torch.inf), every.masked_fill(gone, -1), k
        )
    return exact, columns


def ordered(scores: Tensor, indices: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best by score, then by index; entries of index -1 last. (M, K) to (M, k)."""
    last = torch.iinfo(torch.int64).max
    indices, place = torch.where(indices < 0, torch.full_like(indices, last), indices).sort(
        dim=1, stable=True
    )
    scores = scores.gather(1, place)
    scores, place = scores.sort(dim=1, descending=True, stable=True)
    indices = indices.gather(1, place)
    if scores.shape[1] < k:
        scores = torch.nn.functional.pad(scores, (0, k - scores.shape[1]), value=-torch.inf)
        indices = torch.nn.functional.pad(indices, (0, k - indices.shape[1]), value=last)
    return scores[:, :k], torch.where(indices == last, torch.full_like(indices, -1), indices)[:, :k]
