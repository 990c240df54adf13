"""Dropout of a matrix in place, from a seed."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _env, backend, native
from ..dropout import keep_mask, threshold


def dropout_rows_(t: Tensor, seed: Tensor, first_row: int, p: float) -> Tensor:
    """Zeroes the share p of a contiguous (rows, cols) matrix in place; what is kept is not rescaled.

    Args:
        t: any float dtype.
        seed: () int64 on t's device.
        first_row: number of t's first row in the whole matrix.
        p: share that is dropped.

    Returns:
        t.
    """
    forced = _env.forced_backend()
    if t.device.type == "cpu" and forced in ("auto", "native") and native.available():
        torch.ops.llm2clip_native.dropout_rows_(t, int(seed.item()), first_row, p)
    elif forced == "triton" or (t.is_cuda and forced == "auto" and backend.triton_available()):
        from . import kernel

        kernel.dropout_rows_(t, seed, first_row, threshold(p))
    else:
        t.mul_(keep_mask(seed, first_row, t.shape[0], t.shape[1], p))
    return t
