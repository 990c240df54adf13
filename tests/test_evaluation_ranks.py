"""Ranks and recall against brute force: every order of the ties, every order of the gallery."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm2clip.errors import ModelError
from llm2clip.evaluation.ranks import KS, group_ids, rank_positives, summarise
from llm2clip_kernels.similarity_rank import op as rank_op


def unit_circle(steps: list[int]) -> torch.Tensor:
    """Vectors at multiples of 20 degrees: similarities tie exactly or differ by much more than rounding."""
    angle = torch.tensor(steps, dtype=torch.float64) * (torch.pi / 9)
    return torch.stack([angle.cos(), angle.sin()], dim=1)


def brute_force(query: int, gallery: list[int], right: list[bool]) -> list[int]:
    """Rank of the first right answer in every order that sorts by similarity; ties in all orders."""
    distance = [min((query - g) % 18, (g - query) % 18) for g in gallery]  # the angle decides
    orders = [
        order
        for order in itertools.permutations(range(len(gallery)))
        if all(distance[a] <= distance[b] for a, b in itertools.pairwise(order))
    ]
    return [next(place for place, item in enumerate(order, 1) if right[item]) for order in orders]


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 17),
    st.lists(st.tuples(st.integers(0, 17), st.booleans()), min_size=1, max_size=6),
)
def test_every_measure_is_its_mean_over_all_orders_of_the_ties(
    query: int, entries: list[tuple[int, bool]]
) -> None:
    gallery = [step for step, _ in entries]
    right = [flag for _, flag in entries]
    right[0] = True
    ranks = rank_positives(
        unit_circle([query]), unit_circle(gallery), np.array([1]), np.array([int(flag) for flag in right])
    )
    expected = brute_force(query, gallery, right)
    assert ranks.expected_rank()[0] == pytest.approx(np.mean(expected))
    assert ranks.reciprocal()[0] == pytest.approx(np.mean([1 / rank for rank in expected]))
    for k in range(1, 8):
        assert ranks.recall(k)[0] == pytest.approx(np.mean([rank <= k for rank in expected]))


@pytest.mark.parametrize(("size", "right"), [(1, 1), (5, 1), (6, 2), (6, 5), (7, 7)])
def test_chance_equals_the_enumeration_of_all_galleries(size: int, right: int) -> None:
    groups = np.array([1] * right + [0] * (size - right))
    ranks = rank_positives(torch.ones(1, 3), torch.randn(size, 3), np.array([1]), groups)
    orders = list(itertools.permutations(groups.tolist()))
    for k in range(1, size + 3):
        hits = sum(1 in order[:k] for order in orders)
        assert ranks.chance(k)[0] == pytest.approx(float(Fraction(hits, len(orders))), abs=1e-12)
    first = [order.index(1) + 1 for order in orders]
    assert ranks.chance_reciprocal()[0] == pytest.approx(np.mean([1 / place for place in first]))


@pytest.mark.parametrize("constant", [0.0, 1.0, -3.0])
def test_constant_embeddings_score_exactly_chance(constant: float) -> None:
    groups = np.arange(300) // 3
    same = torch.full((300, 77), constant)
    scores = summarise(rank_positives(same, same, groups, groups))
    for k in map(str, KS):
        assert scores["recall"][k] == pytest.approx(scores["chance"][k], abs=1e-12)
        assert 0 < scores["chance"][k] < 0.15
    assert scores["mrr"] == pytest.approx(scores["chance_mrr"])


def test_identical_rows_tie_wherever_they_stand_in_a_large_gallery() -> None:
    """A GEMM may round equal rows differently in its edge tiles; that must not decide a rank."""
    row = torch.nn.functional.normalize(
        torch.randn(1, 191, generator=torch.Generator().manual_seed(0)), dim=1
    )
    gallery = row.expand(1003, 191).contiguous()
    groups = np.arange(1003)
    ranks = rank_positives(gallery, gallery, groups, groups)
    assert (ranks.above == 0).all() and (ranks.tied_wrong == 1002).all()


def test_perfect_and_inverted_embeddings() -> None:
    groups = np.arange(40)
    eye = torch.eye(40)
    perfect = summarise(rank_positives(eye, eye, groups, groups))
    assert perfect["recall"] == {"1": 1.0, "5": 1.0, "10": 1.0} and perfect["median_rank"] == 1.0
    worst = summarise(rank_positives(-eye, eye, groups, groups))
    assert worst["recall"]["10"] == 0.0 and worst["mrr"] == pytest.approx(1 / 40)


def test_tiles_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(50, 8, generator=generator), torch.randn(31, 8, generator=generator)
    groups_x, groups_y = np.arange(50) % 10, np.arange(31) % 10
    whole = rank_positives(x, y, groups_x, groups_y)
    monkeypatch.setattr(rank_op, "_CPU_TILE", 7)
    parts = rank_positives(x, y, groups_x, groups_y)
    assert (whole.above == parts.above).all() and (whole.right == parts.right).all()
    similarity = torch.nn.functional.cosine_similarity(x[:, None], y[None], dim=2).double().numpy()
    for query in range(50):
        positive = groups_y == groups_x[query]
        best = similarity[query][positive].max()
        assert whole.above[query] == (similarity[query][~positive] > best).sum()


def test_the_interval_holds_the_value_and_shrinks_with_more_queries() -> None:
    widths = []
    for count in (50, 800):
        rng = torch.Generator().manual_seed(1)
        x = torch.randn(count, 4, generator=rng)
        y = x + torch.randn(count, 4, generator=rng)
        scores = summarise(rank_positives(x, y, np.arange(count), np.arange(count)))
        low, high = scores["interval"]["10"]
        assert low <= scores["recall"]["10"] <= high
        widths.append(high - low)
    assert widths[1] < widths[0] / 2


def test_nan_is_an_error_and_not_a_victory() -> None:
    good, bad = torch.eye(3), torch.eye(3)
    bad[1, 1] = float("nan")
    for pair in ((good, bad), (bad, good)):
        with pytest.raises(ModelError, match="NaN"):
            rank_positives(*pair, np.arange(3), np.arange(3))


def test_groups_may_be_any_numbers() -> None:
    x, y = torch.randn(12, 5), torch.randn(9, 5)
    plain = rank_positives(x, y, np.arange(12) % 3, np.arange(9) % 3)
    shifted = rank_positives(x, y, np.arange(12) % 3 - 2, np.arange(9) % 3 - 2)
    assert (plain.above == shifted.above).all() and (plain.right == shifted.right).all()


def test_a_query_without_right_answer_is_an_error() -> None:
    with pytest.raises(ValueError, match="2 queries have no right answer"):
        rank_positives(torch.eye(3), torch.eye(3), np.array([0, 8, 9]), np.arange(3))
    with pytest.raises(ValueError, match="one group per embedding"):
        rank_positives(torch.eye(3), torch.eye(3), np.arange(2), np.arange(3))


def test_items_that_share_an_entry_share_a_group() -> None:
    assert group_ids(["a", "b", "c"], [1, 2, 3]).tolist() == [0, 1, 2]
    # b joins by its second column to a, d by its first to b: a chain
    assert group_ids(["a", "b", "c", "b"], [1, 1, 2, 9]).tolist() == [0, 0, 2, 0]
