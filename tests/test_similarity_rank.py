"""similarity_rank against the whole fp64 matrix: equal, not close, on every shape, dtype and backend."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from llm2clip_kernels import native, retrieval_metrics, similarity_rank, similarity_rank_counts, stripes
from llm2clip_kernels.similarity_rank import RankCounts, op, pairs, similarity_rank_reference

sys.path.insert(0, str(Path(__file__).parent))
from gloo import run_on_ranks  # noqa: E402

SHAPES = [
    (1, 1, 8), (2, 2, 1), (7, 5, 20), (63, 65, 96), (64, 64, 512), (65, 130, 7),
    (252, 507, 123), (70, 1100, 16), (1030, 40, 24), (33, 33, 1280),
]  # fmt: skip
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def features(rows: int, dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return F.normalize(torch.randn(rows, dim), dim=1).to(dtype)


def stacked(counts: RankCounts | None) -> Tensor:
    assert counts is not None
    return torch.stack([counts.above, counts.tied, counts.tied_right, counts.right])


def assert_exact(x: Tensor, y: Tensor, of_x: Tensor, of_y: Tensor, tolerance: float = 0.0) -> None:
    right = (of_x[:, None] == of_y) & (of_x >= 0)[:, None]
    wanted = similarity_rank_reference(x, y, right, tolerance)
    got = similarity_rank_counts(x, y, x_groups=of_x, y_groups=of_y, tolerance=tolerance)
    for side, want in zip(got, wanted, strict=True):
        assert torch.equal(stacked(side), want)
    rows, none = similarity_rank_counts(
        x, y, x_groups=of_x, y_groups=of_y, tolerance=tolerance, directions="rows"
    )
    assert none is None and torch.equal(stacked(rows), wanted[0])


def some_groups(m: int, n: int) -> tuple[Tensor, Tensor]:
    """Several right answers for some, one or none for others."""
    return torch.randint(-1, max(2, n // 2), (m,)), torch.randint(-1, max(2, n // 2), (n,))


@pytest.fixture(params=["native", "chunked"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The C++ kernel, and the stripes in several parts."""
    if request.param == "native":
        if not native.available():
            pytest.skip("the native library is not built")
    else:
        monkeypatch.setattr(op.backend, "choose", lambda *_: "chunked")
        monkeypatch.setattr(stripes, "STRIPE_BYTES", 4)
        monkeypatch.setattr(pairs, "_PAIR_ELEMENTS", 4000)
    return str(request.param)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_counts_are_exact(shape: tuple[int, int, int], dtype: torch.dtype, either: str) -> None:
    m, n, d = shape
    assert_exact(features(m, d, dtype), features(n, d, dtype), *some_groups(m, n))


@pytest.mark.parametrize("tolerance", [1e-6, 1e-2])
def test_tolerance(tolerance: float, either: str) -> None:
    # tolerances below and above what fp32 products can tell
    x = features(150, 20)
    assert_exact(x, F.normalize(x[:120] + 0.5 * features(120, 20), dim=1), *some_groups(150, 120), tolerance)


def test_scores_that_fp32_cannot_tell_apart(either: str) -> None:
    """Galleries of near copies: products differ in the last bits of fp32, and rounding would decide the rank."""
    base = features(1, 96)
    x = F.normalize(base + 1e-4 * torch.randn(90, 96), dim=1)
    y = F.normalize(base + 1e-7 * torch.randn(110, 96), dim=1)
    of_x, of_y = torch.arange(90), torch.arange(110)
    exact = x.double() @ y.double().T
    rounded = x @ y.T
    pick = torch.arange(90)
    assert not torch.equal(
        (rounded > rounded[pick, pick][:, None]).sum(1), (exact > exact[pick, pick][:, None]).sum(1)
    ), "the case must be one that plain fp32 gets wrong"
    assert_exact(x, y, of_x, of_y)


@pytest.mark.parametrize("dim", [1, 17, 191])
def test_equal_features_tie_wherever_they_stand(dim: int, either: str) -> None:
    row = features(1, dim)
    same = row.expand(263, dim).contiguous()
    for rank in similarity_rank(same, same):
        assert (rank == 263).all(), "collapsed features must not look like a success"
    for rank in similarity_rank(same, same, ties="optimistic"):
        assert (rank == 1).all()
    counts, _ = similarity_rank_counts(same, same)
    assert (counts.tied == 262).all() and (counts.tied_right == 1).all()
    assert torch.allclose(counts.accuracy(), torch.full((263,), 1 / 263))


def test_whole_numbers_tie_exactly(either: str) -> None:
    for dtype in DTYPES:
        x, y = (torch.randint(-2, 3, (k, 6)).to(dtype) for k in (90, 70))
        assert_exact(x, y, torch.arange(90) % 20, torch.arange(70) % 25 - 2)


def test_the_diagonal_and_targets(either: str) -> None:
    x, y = features(40, 16), features(55, 16)
    scores = x.double() @ y.double().T
    row, col = similarity_rank(x, y)
    diagonal = scores.diagonal()
    assert torch.equal(row, 1 + (scores > diagonal[:, None]).sum(1))
    assert torch.equal(col[:40], 1 + (scores[:, :40] > diagonal).sum(0)) and (col[40:] == 0).all()
    # several rows for one column, a row without any
    target = torch.randint(0, 5, (40,))
    target[7] = -1
    row, col = similarity_rank(x, y, target)
    for i in range(40):
        want = 0 if i == 7 else 1 + int((scores[i] > scores[i, target[i]]).sum())
        assert row[i] == want
    for j in range(55):
        own = (target == j).nonzero()[:, 0]
        best = scores[own, j].max() if len(own) else None
        want = 0 if best is None else 1 + int(((scores[:, j] > best) & (target != j)).sum())
        assert col[j] == want


def test_values_that_are_no_numbers(either: str) -> None:
    """A right answer with NaN ranks last; a wrong one is never better; nobody else notices."""
    x, y = features(30, 12), features(35, 12)
    clean = similarity_rank(x, y)
    bad_x, bad_y = x.clone(), y.clone()
    bad_x[4, 3] = float("nan")
    bad_y[9] = float("nan")
    row, col = similarity_rank(bad_x, bad_y)
    assert row[4] == row[9] == 35 and col[4] == col[9] == 30
    others = [i for i in range(30) if i not in (4, 9)]
    assert (row[others] <= clean[0][others]).all() and (row[others] >= clean[0][others] - 1).all()
    right = torch.eye(30, 35, dtype=torch.bool)
    bad_x[6], bad_y[2, 5] = float("inf"), float("-inf")
    for got, want in zip(
        similarity_rank_counts(bad_x, bad_y), similarity_rank_reference(bad_x, bad_y, right), strict=True
    ):
        assert torch.equal(stacked(got), want)


def test_norms_of_every_size(either: str) -> None:
    """Huge rows, whose fp32 products overflow, and rows that fp32 products lose."""
    x, y = torch.randn(40, 9), torch.randn(40, 9)
    x[3] *= 1e30
    y[5] *= 1e30
    x[8] *= 1e-30
    y[8] *= 1e-30
    x[11] = y[12] = 0
    assert_exact(x, y, torch.arange(40), torch.arange(40))


def test_tiles_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = features(200, 33), features(301, 33)
    whole = similarity_rank(x, y)
    for tile in (50, 64, 300):
        monkeypatch.setattr(op, "_CPU_TILE", tile)
        for _ in range(2):
            got = similarity_rank(x, y)
            assert torch.equal(got[0], whole[0]) and torch.equal(got[1], whole[1])


@pytest.mark.parametrize("threads", [2, 5])
def test_threads_do_not_change_the_result(threads: int) -> None:
    """Several workers share the rows of a stripe and merge their counts."""
    x, y = features(300, 33), features(1100, 33)
    y[700] = y[3]
    of_x, of_y = some_groups(300, 1100)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_exact(x, y, of_x, of_y)
    finally:
        torch.set_num_threads(before)


def test_layouts_gradients_and_untouched_inputs() -> None:
    x, y = features(24, 10), features(31, 10)
    want = similarity_rank(x, y)
    before = x.clone()
    strided = torch.empty(10, 24).T.copy_(x).requires_grad_(), torch.empty(31, 25)[:, 3:13].copy_(y)
    got = similarity_rank(*strided)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    assert not got[0].requires_grad and got[0].dtype == torch.int64
    assert torch.equal(x, before)
    assert torch.equal(similarity_rank(x[:1].expand(24, 10), y)[0][:1], want[0][:1])


def test_opcheck() -> None:
    # every row and column has a right answer: the check takes NaN for a difference
    x, y = features(9, 4), features(9, 4)
    none = torch.empty(0, dtype=torch.int64)
    for of_x, of_y in ((torch.arange(9), none), (torch.arange(9) % 3, torch.arange(9) % 3)):
        torch.library.opcheck(op._best, (x, y, of_x, of_y))
        best = op._best(x, y, of_x, of_y)
        torch.library.opcheck(op._count, (x, y, of_x, of_y, best[0], best[2], 0.0))
        torch.library.opcheck(op._count, (x, y, of_x, of_y, best[0], best[2][:0], 0.0))


def test_compiles_without_breaks_and_without_recompiling() -> None:
    def both(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        row, col = similarity_rank(x, y)
        return row + 1, col + 1

    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(both, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for rows in (12, 17, 23):
        x, y = features(rows, 8), features(rows + 3, 8)
        got, want = compiled(x, y), both(x, y)
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
        counts.append(counter.frame_count)
    # the first call may analyse twice; no other batch compiles anything
    assert counts[0] == counts[-1]


@pytest.mark.skipif(not native.available(), reason="the native library is not built")
def test_single_pairs_are_scored_the_same_by_every_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = features(9, 37), features(11, 37)
    i, j = torch.randint(0, 9, (50,)), torch.randint(0, 11, (50,))
    ours = pairs.pair_scores(x, y, i, j)
    monkeypatch.setattr(pairs.backend, "choose", lambda *_: "chunked")
    plain = pairs.pair_scores(x, y, i, j)
    assert torch.allclose(ours, plain, rtol=0, atol=1e-15)
    assert torch.allclose(plain, (x.double() @ y.double().T)[i, j], rtol=0, atol=1e-15)
    with pytest.raises(RuntimeError, match="out of range"):
        torch.ops.llm2clip_native.pair_scores(x, y, i + 9, j)


SIZES = [5, 9, 2]


def check_over_ranks(rank: int, world: int) -> None:
    members = SIZES[:world]
    total, start = sum(members), sum(members[:rank])
    mine = slice(start, start + members[rank])
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(total, 7, generator=generator) for _ in "xy")
    y[3] = y[0]  # a tie across ranks
    x[1, 2] = float("nan")
    of_x, of_y = (torch.randint(0, 6, (total,), generator=generator) for _ in "xy")
    target = torch.randint(-1, total, (total,), generator=generator)
    cases: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = [
        ({}, {}),
        ({"x_groups": of_x, "y_groups": of_y}, {"x_groups": of_x[mine], "y_groups": of_y[mine]}),
        ({"target": target}, {"target": target[mine]}),
    ]
    for whole, own in cases:
        for ties in ("pessimistic", "optimistic"):
            want: Any = similarity_rank(x, y, ties=ties, **whole)  # type: ignore[arg-type]
            got: Any = similarity_rank(x[mine], y[mine], ties=ties, gather=True, **own)  # type: ignore[arg-type]
            assert torch.equal(got[0], want[0][mine]) and torch.equal(got[1], want[1][mine])
    subgroup = dist.new_group(list(range(world)))
    got = similarity_rank(x[mine], y[mine], group=subgroup)
    want = similarity_rank(x, y)
    assert torch.equal(got[0], want[0][mine]) and torch.equal(got[1], want[1][mine])
    alone = similarity_rank(x[mine], y[mine])
    assert torch.equal(alone[0], similarity_rank(x[mine], y[mine], gather=False)[0])


@pytest.mark.dist
@pytest.mark.parametrize("world", [1, 2, 3])
def test_over_a_process_group(world: int) -> None:
    run_on_ranks(world, check_over_ranks)


def test_metrics() -> None:
    measures = retrieval_metrics(torch.tensor([1, 3, 0, 12, 2, 1]), ks=(1, 2, 10, 50))
    assert measures["queries"] == 5
    assert measures["recall"] == {1: 0.4, 2: 0.6, 10: 0.8, 50: 1.0}
    assert measures["mrr"] == pytest.approx((1 + 1 / 3 + 1 / 12 + 1 / 2 + 1) / 5)
    assert measures["median_rank"] == 2.0 and measures["mean_rank"] == pytest.approx(3.8)
    assert retrieval_metrics(torch.tensor([4, 1]))["median_rank"] == 2.5
    assert (
        retrieval_metrics(torch.zeros(3, dtype=torch.int64))["mrr"]
        != retrieval_metrics(torch.ones(3).long())["mrr"]
    )
    for bad, error in (
        (torch.ones(3), TypeError),
        ([1, 2], TypeError),
        (torch.ones(3, 1).long(), ValueError),
    ):
        with pytest.raises(error, match="retrieval_metrics"):
            retrieval_metrics(bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="every k"):
        retrieval_metrics(torch.ones(3).long(), ks=(0,))


X, Y, IDS = torch.ones(3, 4), torch.ones(5, 4), torch.zeros(3, dtype=torch.int64)
BAD: list[tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
    ((X[0], Y), {}, ValueError, "2-D"),
    ((X, torch.ones(5, 6)), {}, ValueError, "one D"),
    ((X, Y.half()), {}, TypeError, "one dtype"),
    ((X[:0], Y), {}, ValueError, "empty"),
    ((Y, X), {}, ValueError, "give target or groups"),
    ((X, Y, IDS[:2]), {}, ValueError, "shape"),
    ((X, Y, IDS.float()), {}, TypeError, "int64"),
    ((X, Y, IDS + 5), {}, ValueError, "no column"),
    ((X, Y, IDS.to("meta")), {}, ValueError, "must be on"),
    ((X, Y), {"x_groups": IDS}, ValueError, "only one of the two"),
    ((X, X, IDS), {"x_groups": IDS, "y_groups": IDS}, ValueError, "not both"),
    ((X, Y), {"ties": "half"}, ValueError, "ties"),
    ((X, Y), {"tolerance": -1.0}, ValueError, "tolerance"),
    ((X, Y), {"tolerance": float("nan")}, ValueError, "tolerance"),
]


@pytest.mark.parametrize(("args", "options", "error", "message"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_bad_input(args: Any, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        similarity_rank(*args, **options)
