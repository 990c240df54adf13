"""similarity_topk against a stable sort of the whole fp64 matrix: the same indices, not nearly the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import Tensor

from llm2clip_kernels import SimilarityTopK, native, similarity_topk, similarity_topk_stream
from llm2clip_kernels.similarity_topk import chunked, op, similarity_topk_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# rows, columns, D, k: one pair, fewer columns than k, ragged, several tiles, the largest k
SHAPES = [
    (1, 1, 8, 1), (1, 1, 3, 5), (7, 9, 1, 9), (63, 65, 96, 10), (33, 1500, 7, 64), (130, 257, 123, 64),
    (1030, 40, 24, 3), (4, 300, 1280, 17),
]  # fmt: skip


def features(rows: int, dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return F.normalize(torch.randn(rows, dim), dim=1).to(dtype)


def assert_exact(
    x: Tensor, y: Tensor, k: int, of_x: Tensor | None = None, of_y: Tensor | None = None
) -> None:
    excluded = None if of_x is None or of_y is None else (of_x[:, None] == of_y) & (of_x >= 0)[:, None]
    scores, indices = similarity_topk(x, y, k, x_groups=of_x, y_groups=of_y)
    want, where = similarity_topk_reference(x, y, k, excluded)
    assert scores.dtype == torch.float32 and indices.dtype == torch.int64
    assert torch.equal(indices, where)
    assert torch.allclose(scores, want.float(), rtol=1e-6, atol=1e-30)


@pytest.fixture(params=["native", "chunked"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The C++ kernel, and the stripes in several parts."""
    if request.param == "native":
        if not native.available():
            pytest.skip("the native library is not built")
    else:
        monkeypatch.setattr(op.backend, "choose", lambda *_: "chunked")
        monkeypatch.setattr(chunked, "STRIPE_BYTES", 4 * 4096 * 30)
    return str(request.param)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_indices_are_exact(shape: tuple[int, int, int, int], dtype: torch.dtype, either: str) -> None:
    m, n, d, k = shape
    x, y = features(m, d, dtype), features(n, d, dtype)
    assert_exact(x, y, k)
    assert_exact(x, y, k, torch.randint(-1, 4, (m,)), torch.randint(-1, 4, (n,)))


def test_candidates_that_fp32_cannot_tell_apart(either: str) -> None:
    base = features(1, 96)
    x = F.normalize(base + 1e-4 * torch.randn(20, 96), dim=1)
    y = F.normalize(base + 1e-7 * torch.randn(400, 96), dim=1)
    assert not torch.equal((x @ y.T).topk(10).indices, similarity_topk_reference(x, y, 10)[1]), "too easy"
    assert_exact(x, y, 10)


def test_equal_candidates_go_by_the_lower_index(either: str) -> None:
    rows = features(3, 191)
    y = rows.repeat(200, 1)
    assert_exact(rows, y, 64)
    assert similarity_topk(rows[:1], y, 5)[1].tolist() == [[0, 3, 6, 9, 12]]
    for dtype in DTYPES:
        assert_exact(torch.randint(-2, 3, (30, 5)).to(dtype), torch.randint(-2, 3, (300, 5)).to(dtype), 20)


def test_values_that_are_no_numbers(either: str) -> None:
    x, y = features(20, 12), features(90, 12)
    x[3, 1] = float("nan")
    x[4] = 0
    x[5, 2] = float("inf")
    x[6] *= 1e30
    y[7] = float("nan")
    y[8, 5] = float("-inf")
    y[9] *= 1e30
    assert_exact(x, y, 10)
    scores, indices = similarity_topk(x, y, 3)
    assert (indices[3] == -1).all() and scores[3].isneginf().all()


def test_best_last_and_best_first(either: str) -> None:
    """Every candidate better than all before it, and the other way round."""
    y = torch.linspace(-1, 1, 700)[:, None]
    x = torch.tensor([[1.0], [-1.0]])
    assert_exact(x, y, 64)


def test_chunks_and_tiles_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    x, y = features(50, 24), features(700, 24)
    of_x, of_y = torch.arange(50) % 7, torch.arange(700) % 11
    want = similarity_topk(x, y, 12, x_groups=of_x, y_groups=of_y)
    for sizes in ((700,), (1, 699), (333, 3, 364)):
        best = SimilarityTopK(x, 12, groups=of_x)
        for part, groups in zip(y.split(list(sizes)), of_y.split(list(sizes)), strict=True):
            best.update(part, groups)
        assert best.rows == 700
        assert all(torch.equal(a, b) for a, b in zip(best.result(), want, strict=True))
    for tile in (50, 64, 300):
        monkeypatch.setattr(op, "_CPU_TILE", tile)
        got = similarity_topk(x, y, 12, x_groups=of_x, y_groups=of_y)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    monkeypatch.setattr(op, "_CHUNK_ROWS", 100)
    half = similarity_topk(x.half(), y.half(), 12)
    assert torch.equal(half[1], similarity_topk_reference(x.half(), y.half(), 12)[1])


@pytest.mark.parametrize("threads", [2, 5])
def test_threads_do_not_change_the_result(threads: int) -> None:
    """Several workers see parts of a row's candidates and merge their lists."""
    x, y = features(300, 33), features(1100, 33)
    y[700] = y[3]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_exact(x, y, 64, torch.randint(-1, 4, (300,)), torch.randint(-1, 4, (1100,)))
        assert_exact(x[:3], y, 5)
    finally:
        torch.set_num_threads(before)


def test_galleries_that_are_no_tensor(tmp_path: Path) -> None:
    x, y = features(9, 16), features(500, 16)
    want = similarity_topk(x, y, 5)
    stored = np.memmap(tmp_path / "gallery", "float32", "w+", shape=(500, 16))
    stored[:] = y.numpy()
    stored.flush()
    read_only = np.memmap(tmp_path / "gallery", "float32", "r", shape=(500, 16))

    def parts() -> Iterator[tuple[Tensor, Tensor]]:
        for part in y.split(77):
            yield part, torch.full((len(part),), 3)

    for gallery in (read_only, y, y.split(77), iter(y.numpy().reshape(5, 100, 16))):
        got = similarity_topk_stream(x, gallery, 5, rows=64)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    got = similarity_topk_stream(x, parts(), 5, x_groups=torch.tensor([3] + [1] * 8))
    assert (got[1][0] == -1).all() and torch.equal(got[1][1:], want[1][1:])
    half = similarity_topk_stream(x.half(), read_only, 5, rows=64)
    assert torch.equal(half[1], similarity_topk(x.half(), y.half(), 5)[1])
    for bad, error in (([], ValueError), (5, TypeError)):
        with pytest.raises(error, match="gallery"):
            similarity_topk_stream(x, bad, 5)
    with pytest.raises(ValueError, match="rows"):
        similarity_topk_stream(x, y, 5, rows=0)


def test_opcheck_and_compile() -> None:
    x, y = features(6, 4), features(9, 4)
    none = torch.empty(0, dtype=torch.int64)
    empty = torch.full((6, 3), -torch.inf, dtype=torch.float64), torch.full((6, 3), -1)
    torch.library.opcheck(op._update, (x, y, *empty, 0, none, none))
    torch.library.opcheck(op._update, (x, y, *empty, 5, torch.arange(6), torch.arange(9)))

    def best(x: Tensor, y: Tensor) -> Tensor:
        return similarity_topk(x, y, 4)[1] + 1

    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(best, fullgraph=True, dynamic=True, backend=counter)
    for rows in (12, 17, 23):
        x, y = features(rows, 8), features(rows + 3, 8)
        assert torch.equal(compiled(x, y), best(x, y))
    assert counter.frame_count == 1


def test_layouts_and_gradients() -> None:
    x, y = features(24, 10), features(31, 10)
    want = similarity_topk(x, y, 6)
    strided = torch.empty(10, 24).T.copy_(x).requires_grad_(), torch.empty(31, 25)[:, 3:13].copy_(y)
    got = similarity_topk(*strided, 6)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)) and not got[0].requires_grad


X, Y, IDS = torch.ones(3, 4), torch.ones(5, 4), torch.zeros(3, dtype=torch.int64)
BAD: list[tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
    ((X[0], Y, 2), {}, ValueError, "2-D"),
    ((X, torch.ones(5, 6), 2), {}, ValueError, "one D"),
    ((X, Y.half(), 2), {}, TypeError, "one dtype"),
    ((X, Y[:0], 2), {}, ValueError, "empty"),
    ((X, Y, 0), {}, ValueError, "from 1 to 64"),
    ((X, Y, 65), {}, ValueError, "from 1 to 64"),
    ((X, Y, 2.0), {}, ValueError, "from 1 to 64"),
    ((X, Y, 2), {"x_groups": IDS}, ValueError, "only one of the two"),
    ((X, Y, 2), {"x_groups": IDS, "y_groups": IDS}, ValueError, "one id for each"),
    ((X, X, 2), {"x_groups": IDS, "y_groups": IDS.float()}, TypeError, "integer"),
]


@pytest.mark.parametrize(("args", "options", "error", "message"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_bad_input(args: Any, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        similarity_topk(*args, **options)
