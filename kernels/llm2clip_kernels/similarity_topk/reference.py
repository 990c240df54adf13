"""What `similarity_topk` means, in plain torch with the whole fp64 matrix in memory. Tests compare against this."""

from __future__ import annotations

import torch
from torch import Tensor


def similarity_topk_reference(
    x: Tensor, y: Tensor, k: int, excluded: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The k best columns of every row of x yᵀ by a stable sort.

    Args:
        x: (M, D), any floating dtype.
        y: (N, D).
        k: columns to return.
        excluded: (M, N) bool, pairs left out; or None.

    Returns:
        scores (M, k) fp64 and indices (M, k) int64; -inf and -1 where there are fewer candidates.
    """
    # (M, N, D): a library's matrix product may round equal columns differently
    scores = (x.double()[:, None] * y.double()).sum(2)
    left_out = scores.isnan() if excluded is None else scores.isnan() | excluded
    keys = scores.masked_fill(left_out, -torch.inf)
    # candidates first, then by score; the sort keeps the order of indices
    order = torch.argsort(keys, dim=1, descending=True, stable=True)
    order = order.gather(1, torch.argsort(left_out.gather(1, order).byte(), dim=1, stable=True))
    order = torch.cat([order, order.new_zeros(len(x), max(0, k - len(y)))], dim=1)[:, :k]
    count = (~left_out).sum(1, keepdim=True)
    missing = torch.arange(k) >= count
    return (
        keys.gather(1, order).masked_fill(missing, -torch.inf),
        order.masked_fill(missing, -1),
    )
