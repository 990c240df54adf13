"""What `segment_mean` means: one sequence after another, in plain torch. Tests compare against this."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def segment_mean_reference(
    hidden: Tensor, cu_seqlens: Tensor, *, spans: Tensor | None = None, normalize: bool = False
) -> Tensor:
    """(T, H), (B+1,) -> (B, H) in the dtype of hidden; waits for the device. Arguments as in `segment_mean`."""
    edges = cu_seqlens.tolist()
    bounds = [(0, stop - start) for start, stop in zip(edges, edges[1:], strict=False)]
    if spans is not None:
        bounds = [(first, last) for first, last in spans.tolist()]
    means = torch.stack(
        [
            hidden[edge + first : edge + last].mean(0)
            for edge, (first, last) in zip(edges, bounds, strict=False)
        ]
    )
    return F.normalize(means, dim=-1) if normalize else means
