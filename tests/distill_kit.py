"""Inputs of the tests of similarity_distill, and its results without the options."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llm2clip_kernels import similarity_distill

NAMES = ("row", "col", "cross_row", "cross_col", "dx", "dy", "dscale")


def features(rows: int, dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return F.normalize(torch.randn(rows, dim), dim=1).to(dtype)


def four(m: int, n: int, d: int, e: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [features(m, d, dtype), features(n, d, dtype), features(m, e, dtype), features(n, e, dtype)]


def ours(*inputs: Any) -> tuple[Tensor, ...]:
    terms = similarity_distill(*inputs)
    assert terms.col_lse is not None and terms.cross_col is not None
    return terms.row_lse, terms.col_lse, terms.cross_row, terms.cross_col
