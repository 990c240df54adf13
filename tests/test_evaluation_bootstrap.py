"""Bootstrap intervals against drawing the queries themselves, and against what theory says."""

from __future__ import annotations

import numpy as np
import pytest

from llm2clip.evaluation.bootstrap import mean_interval, paired_difference


def drawn_means(values: np.ndarray, clusters: np.ndarray, resamples: int) -> np.ndarray:
    """The definition: draw whole clusters with replacement, take the mean of all their values."""
    rng = np.random.default_rng(1)
    ids = np.unique(clusters)
    members = [np.flatnonzero(clusters == number) for number in ids]
    means = []
    for _ in range(resamples):
        rows = np.concatenate([members[c] for c in rng.integers(0, len(ids), len(ids))])
        means.append(values[rows].mean())
    return np.array(means)


@pytest.mark.parametrize("clustered", [False, True])
def test_intervals_are_those_of_drawing_the_clusters(clustered: bool) -> None:
    rng = np.random.default_rng(0)
    clusters = np.sort(rng.integers(0, 60, 300)) if clustered else np.arange(300)
    hard = rng.random(300)[clusters]  # captions of one image are hard or easy together
    values = (rng.random(300) < hard).astype(float)
    values[:20] = rng.choice([0.25, 1 / 3], 20)  # ties broken in expectation give fractions
    want = np.percentile(drawn_means(values, clusters, 4000), [2.5, 97.5])
    got = mean_interval(values, clusters if clustered else None, resamples=4000)
    assert np.allclose(got, want, atol=0.01)


def test_captions_of_one_image_are_no_independent_queries() -> None:
    values = np.repeat(np.random.default_rng(0).integers(0, 2, 100), 5).astype(float)
    alone = mean_interval(values)
    together = mean_interval(values, np.repeat(np.arange(100), 5))
    ratio = (together[1] - together[0]) / (alone[1] - alone[0])
    assert ratio == pytest.approx(5**0.5, rel=0.15)


def test_the_interval_of_a_share_is_the_normal_one() -> None:
    values = np.zeros(4_000_000)
    values[:1_000_000] = 1  # a matrix of all drawn queries would have 4 billion entries
    low, high = mean_interval(values)
    half = 1.96 * (0.25 * 0.75 / len(values)) ** 0.5
    assert (low + high) / 2 == pytest.approx(0.25, abs=half / 5)
    assert (high - low) / 2 == pytest.approx(half, rel=0.1)


def test_pairing_makes_small_differences_certain() -> None:
    rng = np.random.default_rng(0)
    hard = rng.random(2000)
    first = (rng.random(2000) < hard).astype(float)
    second = first.copy()
    second[rng.choice(np.flatnonzero(first), 20, replace=False)] = 0  # one in a hundred is worse
    found = paired_difference(first, second)
    assert found.mean == pytest.approx(0.01) and found.certain and 0 < found.low < 0.01 < found.high
    width = mean_interval(first)[1] - mean_interval(first)[0]
    assert found.high - found.low < width / 3
    assert not paired_difference(first, first[rng.permutation(2000)]).certain
    back = paired_difference(second, first)
    assert back.mean == -found.mean and back.certain and back.high < 0


def test_equal_seeds_give_equal_intervals_and_bad_input_is_refused() -> None:
    values = np.random.default_rng(0).random(50)  # 50 kinds of cluster
    assert mean_interval(values, seed=3) == mean_interval(values, seed=3) != mean_interval(values, seed=4)
    with pytest.raises(ValueError, match="at least one query"):
        mean_interval([])
    with pytest.raises(ValueError, match="one cluster per value"):
        mean_interval(values, np.zeros(3, np.int64))
    with pytest.raises(ValueError, match="a pair of values"):
        paired_difference(values, values[:3])
