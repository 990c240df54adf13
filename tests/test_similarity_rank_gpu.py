"""similarity_rank and similarity_topk on a CUDA GPU: exact, deterministic, in graphs. Skipped where there is none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llm2clip_kernels import similarity_rank, similarity_rank_counts, similarity_topk
from llm2clip_kernels.similarity_rank import similarity_rank_reference
from llm2clip_kernels.similarity_topk import similarity_topk_reference
from tests.on_gpu import MARKS, SHAPES, features

pytestmark = MARKS

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def assert_exact(x: Tensor, y: Tensor, of_x: Tensor, of_y: Tensor, tolerance: float = 0.0) -> None:
    right = (of_x[:, None] == of_y) & (of_x >= 0)[:, None]
    got = similarity_rank_counts(x, y, x_groups=of_x, y_groups=of_y, tolerance=tolerance)
    for side, want in zip(got, similarity_rank_reference(x, y, right, tolerance), strict=True):
        assert side is not None
        assert torch.equal(torch.stack([side.above, side.tied, side.tied_right, side.right]), want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_counts_are_exact(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    m, n, d = shape
    of_x, of_y = (torch.randint(-1, max(2, n // 2), (k,)).cuda() for k in (m, n))
    for tolerance in (0.0, 1e-2):
        assert_exact(features(m, d, dtype), features(n, d, dtype), of_x, of_y, tolerance)


@pytest.mark.parametrize("tf32", [False, True])
def test_the_error_bounds_hold_on_tensor_cores(tf32: bool) -> None:
    """Near copies: were a product off by more than its bound, some count would differ."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        base = features(1, 512, torch.float32)
        for dtype in DTYPES[:3]:
            noise = 1e-6 if dtype == torch.float32 else 1e-2
            x = (base + noise * torch.randn(700, 512).cuda()).to(dtype)
            y = (base + noise * torch.randn(900, 512).cuda()).to(dtype)
            every = torch.arange(900).cuda()
            assert_exact(x, y, every[:700], every)
    finally:
        torch.set_float32_matmul_precision(before)


def test_collapsed_features_overflow_every_list() -> None:
    same = features(1, 64, torch.bfloat16).expand(2000, 64).contiguous()
    for rank in similarity_rank(same, same):
        assert (rank == 2000).all()


def test_the_same_result_every_run_and_in_a_graph() -> None:
    x, y = features(3000, 512, torch.bfloat16), features(3000, 512, torch.bfloat16)
    first = similarity_rank(x, y)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, similarity_rank(x, y), strict=True))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        similarity_rank(x, y)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = similarity_rank(x, y)
    other = features(3000, 512, torch.bfloat16)
    x.copy_(other)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, similarity_rank(other, y), strict=True))


def test_more_pairs_than_32_bits_count() -> None:
    rows = 50_000  # 2.5e9 pairs
    x, y = features(rows, 16, torch.bfloat16), features(rows, 16, torch.bfloat16)
    row, col = similarity_rank(x, y)
    chosen = torch.tensor([0, 1, rows // 2, rows - 1], device="cuda")
    for rank, a, b in ((row, x, y), (col, y, x)):
        scores = a[chosen].double() @ b.double().T
        best = scores.gather(1, chosen[:, None])
        assert torch.equal(rank[chosen], (scores > best + 1e-13).sum(1) + 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_topk_is_exact(dtype: torch.dtype) -> None:
    for m, n, d, k in ((1, 1, 8, 3), (63, 1500, 96, 64), (300, 5000, 20, 10)):
        x, y = features(m, d, dtype), features(n, d, dtype)
        y[n // 2] = y[0]
        assert torch.equal(similarity_topk(x, y, k)[1], similarity_topk_reference(x, y, k)[1])
