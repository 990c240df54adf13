"""Inf-CLIP's loss functions: its signatures, values and gradients, on any device and for any D."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from .. import distributed
from ..autocast import follows_autocast
from ..checks import check_integers, check_pair, scale_tensor
from ..contrastive.ring import ring_lse
from ..similarity_lse.op import NO_DIAGONAL, similarity_lse_with_positives


def _check_labels(labels: Tensor | None, q: Tensor, k: Tensor, name: str) -> None:
    if labels is None:
        if q.shape[0] > k.shape[0]:
            raise ValueError(
                f"{name}: without labels row i of q belongs to row i of k, but q has {q.shape[0]} rows and k "
                f"{k.shape[0]}"
            )
        return
    check_integers(labels, "labels", name)
    if labels.shape != q.shape[:1]:
        raise ValueError(
            f"{name}: labels must hold one row of k for each of {q.shape[0]} rows of q, got shape "
            f"{tuple(labels.shape)}"
        )


def _terms(
    q: Tensor, k: Tensor, labels: Tensor | None, scale: Tensor | float | None, name: str, ring: bool
) -> Tensor:
    """(M,) cross-entropies of the rows of q against k, of all ranks in a ring."""
    check_pair(q, k, name)
    _check_labels(labels, q, k, name)
    factor = scale_tensor(1.0 if scale is None else scale, q, name)
    # the own column's logit comes best out of the kernel
    paired = labels is None and (not ring or q.shape[0] == k.shape[0])
    if ring:
        # as Inf-CLIP: every rank gets the gradient of scale summed over the ranks
        factor = distributed.sum_gradient(factor, None)
        row, row_low, _, _, pos, pos_low, _, _ = ring_lse(
            q, k, factor, counts=distributed.row_counts(k.shape[0], None, k.device), paired=paired,
            x_ids=None, every_y_ids=None, masked=False, sums=False, group=None,
        )  # fmt: skip
    else:
        row, _, found, low = similarity_lse_with_positives(
            q, k, factor, directions="rows", diagonal=0 if paired else NO_DIAGONAL
        )
        row_low, pos_low = low[: row.shape[0]], low[row.shape[0] :]
        pos = row.new_empty(0) if found is None else found
    if not paired:
        own = k[: q.shape[0]] if labels is None else k[labels.to(torch.int64)]
        pos = (q.to(row.dtype) * own.to(row.dtype)).sum(1) * factor
        pos_low = torch.zeros_like(pos)
    return (row - pos) + (row_low - pos_low)


@follows_autocast
def cal_flash_loss(
    q: Tensor,
    k: Tensor,
    labels: Tensor | None = None,
    scale: Tensor | float | None = None,
    head_dim: int = 256,
) -> Tensor:
    """Inf-CLIP's `cal_flash_loss`: cross-entropy of every row of q against all rows of k, this process alone.

    Args:
        q: (M, D) queries.
        k: (N, D) keys, dtype of q.
        labels: (M,) integer, row of k that belongs to each row of q, any of them any number of times; None for
            0, 1, 2, ...
        scale: multiplier of the dot products; None for 1. A tensor gets its gradient.
        head_dim: accepted; here D need not be a multiple of it.

    Returns:
        (M,) losses, fp32 (fp64 for fp64).

    Raises:
        TypeError, ValueError: inputs that do not fit.
    """
    return _terms(q, k, labels, scale, "cal_flash_loss", ring=False)


@follows_autocast
def cal_inf_loss(
    q: Tensor,
    k: Tensor,
    labels: Tensor | None = None,
    scale: Tensor | float | None = None,
    head_dim: int = 256,
) -> Tensor:
    """Inf-CLIP's `cal_inf_loss`: the mean cross-entropy of q's rows against the rows of k of all ranks.

    Under an initialised process group k travels around the ring of all ranks in O((M+N)·D) memory per rank; each
    rank returns the mean of its own rows, the gradients of q and k are of the sum of these over the ranks, and the
    gradient of `scale` is that sum's on every rank. Ranks may hold different numbers of rows. For CLIP's loss
    average `cal_inf_loss(image, text, scale=s)` and `cal_inf_loss(text, image, scale=s)`; `infonce_loss` does
    both in one sweep.

    Args:
        q, k, labels, scale, head_dim: as in `cal_flash_loss`; labels count this rank's rows of k.

    Returns:
        0-dim loss of this rank.

    Raises:
        TypeError, ValueError: inputs that do not fit.
    """
    ring = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return _terms(q, k, labels, scale, "cal_inf_loss", ring).mean()


cal_ring_loss = cal_inf_loss
"""The same value and gradients, which Inf-CLIP computes without its kernels under this name."""
