"""What `l2_normalize` means, in torch's own words. Tests compare against this."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def l2_normalize_reference(x: Tensor, *, dtype: torch.dtype | None = None, eps: float = 1e-12) -> Tensor:
    """x / max(‖x‖, eps) over the last dimension, in `dtype` (default: that of x); differentiable."""
    return F.normalize(x, dim=-1, eps=eps).to(x.dtype if dtype is None else dtype)
