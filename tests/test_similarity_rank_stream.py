"""Ranks of features on disk, block by block and over ranks: equal to those of the whole arrays, to the last tie."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llm2clip_kernels import similarity_rank_counts, similarity_rank_stream
from llm2clip_kernels.similarity_rank import RankCounts

sys.path.insert(0, str(Path(__file__).parent))
from gloo import run_on_ranks  # noqa: E402


def stacked(counts: RankCounts | None) -> Tensor:
    assert counts is not None
    return torch.stack([counts.above, counts.tied, counts.tied_right, counts.right])


def case(m: int, n: int, dim: int = 12, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Features with ties and NaN, and groups with several right answers, one and none."""
    x, y = (F.normalize(torch.randn(k, dim), dim=1) for k in (m, n))
    y[n // 2] = y[0]
    x[m // 2, 1] = float("nan")
    of_x, of_y = (torch.randint(-1, max(2, n // 3), (k,)) for k in (m, n))
    return x.to(dtype), y.to(dtype), of_x, of_y


@pytest.mark.parametrize("rows", [7, 16, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_blocks_change_nothing(rows: int, dtype: torch.dtype) -> None:
    x, y, of_x, of_y = case(33, 50, dtype=dtype)
    for tolerance in (0.0, 1e-2):
        want = similarity_rank_counts(x, y, x_groups=of_x, y_groups=of_y, tolerance=tolerance)
        got = similarity_rank_stream(x, y, x_groups=of_x, y_groups=of_y, tolerance=tolerance, rows=rows)
        for mine, whole in zip(got, want, strict=True):
            assert torch.equal(stacked(mine), stacked(whole))
            assert mine is not None and whole is not None and mine.candidates == whole.candidates
    alone, none = similarity_rank_stream(x, y, x_groups=of_x, y_groups=of_y, directions="rows", rows=rows)
    assert none is None
    assert torch.equal(stacked(alone), stacked(similarity_rank_counts(x, y, x_groups=of_x, y_groups=of_y)[0]))


class Slices:
    """An array on disk that says how many rows were asked for at once."""

    def __init__(self, values: Tensor, path: Path) -> None:
        values.numpy().tofile(path)
        self.values = np.memmap(path, "float32", "r", shape=tuple(values.shape))
        self.shape = self.values.shape
        self.read: list[int] = []

    def __getitem__(self, part: slice) -> Any:
        self.read.append(part.stop - part.start)
        return self.values[part]


def test_only_blocks_are_read_from_disk(tmp_path: Path) -> None:
    x, y, of_x, of_y = case(20, 90)
    of_y[:60] = -1  # nothing there is a right answer: those blocks are read for the counts alone
    stored = Slices(y, tmp_path / "y.bin")
    got = similarity_rank_stream(x, stored, x_groups=of_x, y_groups=of_y, rows=30)
    want = similarity_rank_counts(x, y, x_groups=of_x, y_groups=of_y)
    assert torch.equal(stacked(got[0]), stacked(want[0])) and torch.equal(stacked(got[1]), stacked(want[1]))
    assert max(stored.read) == 30 and len(stored.read) == 1 + 1 + 3


def check_over_ranks(rank: int, world: int) -> None:
    torch.manual_seed(0)
    x, y, of_x, of_y = case(23, 31)
    want = similarity_rank_counts(x, y, x_groups=of_x, y_groups=of_y)
    for rows in (4, 100):  # 100: one block, so that all ranks but one have nothing to do
        got = similarity_rank_stream(x, y, x_groups=of_x, y_groups=of_y, rows=rows, gather=True)
        for mine, whole in zip(got, want, strict=True):
            assert torch.equal(stacked(mine), stacked(whole))
    alone, _ = similarity_rank_stream(
        x, y, x_groups=of_x, y_groups=of_y, rows=4, gather=True, directions="rows"
    )
    assert torch.equal(stacked(alone), stacked(want[0]))


@pytest.mark.dist
def test_over_a_process_group() -> None:
    run_on_ranks(3, check_over_ranks)


IDS = torch.zeros(3, dtype=torch.int64)
X, Y = torch.ones(3, 4), torch.ones(5, 4)
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"x": X[0]}, ValueError, r"array \(rows, D\)"),
    ({"x": [1, 2]}, ValueError, "got list"),
    ({"y": torch.ones(5, 6)}, ValueError, "one D"),
    ({"y": Y.half()}, TypeError, "one dtype"),
    ({"x_groups": IDS[:2]}, ValueError, "one id for each of 3"),
    ({"x_groups": IDS.float()}, TypeError, "integer"),
    ({"rows": 0}, ValueError, "rows must be 1"),
    ({"directions": "columns"}, ValueError, "directions"),
    ({"tolerance": -1.0}, ValueError, "tolerance"),
]


@pytest.mark.parametrize(("changes", "error", "message"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_bad_input(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {"x": X, "y": Y, "x_groups": IDS, "y_groups": torch.zeros(5, dtype=torch.int64), **changes}
    with pytest.raises(error, match=message):
        similarity_rank_stream(**given)
