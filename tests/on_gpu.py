"""What the GPU tests of the similarity ops share."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

MARKS = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
]
# rows, columns, D; D = 20 and 7 leave rows of bf16 off 16 bytes, where the copy engine cannot serve
SHAPES = [
    (1, 1, 8),
    (7, 5, 20),
    (63, 65, 96),
    (65, 130, 7),
    (252, 507, 123),
    (1030, 40, 24),
    (333, 4100, 1280),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def features(rows: int, dim: int, dtype: torch.dtype) -> Tensor:
    """(rows, dim) of unit norm on the GPU."""
    return F.normalize(torch.randn(rows, dim), dim=1).cuda().to(dtype)
