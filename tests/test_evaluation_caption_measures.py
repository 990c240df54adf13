"""Alignment, uniformity, Spearman and CRA against their definitions in fp64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from llm2clip.data.store import EmbeddingStore, StoreWriter
from llm2clip.evaluation.caption_measures import (
    alignment,
    percentile_interval,
    rank_pairs,
    spearman,
    spearman_intervals,
    through_store,
    uniformity,
)
from llm2clip.evaluation.caption_retrieval import CaptionPairs


def pairs_of(first: list[str], second: list[str]) -> CaptionPairs:
    return CaptionPairs("captions", first, second, ("first → second", "second → first"))


def test_alignment_and_uniformity_are_those_of_the_definition() -> None:
    x, y = torch.randn(200, 24), torch.randn(200, 24)
    y = x + 0.5 * y
    a, b = (torch.nn.functional.normalize(v.double(), dim=1) for v in (x, y))
    assert alignment(x, 4 * y) == pytest.approx(float((a - b).pow(2).sum(1).mean()), rel=1e-9)
    expected = float(torch.pdist(a).pow(2).mul(-2).exp().mean().log())
    assert uniformity(x) == pytest.approx(expected, rel=1e-5)
    assert uniformity(7 * x) == pytest.approx(expected, rel=1e-5)


def test_uniformity_at_its_ends() -> None:
    assert uniformity(torch.ones(50, 8)) == pytest.approx(0, abs=1e-5)  # one point
    assert uniformity(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])) == pytest.approx(-8, abs=1e-4)
    assert uniformity(torch.eye(64)) == pytest.approx(-4, abs=1e-5)


def test_retrieval_both_ways_by_hand() -> None:
    first = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.9, 1.0]])
    second = torch.tensor([[1.0, 0.2, 0.0], [0.0, 0.9, 1.0], [0.0, 1.0, 0.4]])
    ranks = rank_pairs(first, second, pairs_of(list("abc"), list("def")), shared="wrong")
    scores = torch.nn.functional.normalize(first, dim=1) @ torch.nn.functional.normalize(second, dim=1).T
    for found, matrix in ((ranks.forward, scores), (ranks.backward, scores.T)):
        expected = (matrix > matrix.diagonal()[:, None]).sum(1) + 1
        assert found.expected_rank().tolist() == expected.tolist()
    assert ranks.forward.recall(1).tolist() == [1.0, 0.0, 0.0]
    assert ranks.backward.recall(1).tolist() == [1.0, 0.0, 0.0]


def test_the_very_text_of_the_right_caption() -> None:
    # images 0 and 1 have the same second caption, which no encoder can tell apart
    first, second = torch.eye(3), torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    texts = pairs_of(list("abc"), ["same", "same", "other"])
    wrong = rank_pairs(first, second, texts, shared="wrong").forward.recall(1)
    assert wrong.tolist() == [0.5, 0.5, 1.0]  # a tie that is broken at random
    right = rank_pairs(first, second, texts, shared="right").forward.recall(1)
    assert right.tolist() == [1.0, 1.0, 1.0]


def _pearson_of_ranks(x: np.ndarray, y: np.ndarray) -> float:
    def ranks(v: np.ndarray) -> np.ndarray:
        return np.array([(v < one).sum() + ((v == one).sum() + 1) / 2 for one in v])

    return float(np.corrcoef(ranks(x), ranks(y))[0, 1])


def test_spearman_shares_the_ranks_of_ties() -> None:
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 6, 80).astype(float)
    values = scores + rng.normal(size=80) * 3
    assert spearman(values, scores) == pytest.approx(_pearson_of_ranks(values, scores), rel=1e-12)
    assert spearman(np.exp(values), scores) == pytest.approx(spearman(values, scores), rel=1e-12)
    assert spearman(scores, scores) == pytest.approx(1) and spearman(-scores, scores) == pytest.approx(-1)
    assert spearman(np.ones(80), scores) == 0.0
    good, bad = spearman_intervals([scores, values], scores, resamples=200)
    assert good.min() > 1 - 1e-12
    low, high = percentile_interval(bad)
    assert low < spearman(values, scores) < high and high - low > 0.05
    again = spearman_intervals([values], scores, resamples=200)[0]
    assert np.array_equal(again, bad)  # every encoder sees the same samples


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16", "int8", "fp8"])
def test_through_store_is_what_a_store_returns(tmp_path: object, dtype: str) -> None:
    values = torch.randn(30, 16)
    names = [str(number) for number in range(30)]
    with StoreWriter(str(tmp_path), dim=16, dtype=dtype, fingerprint={}) as out:  # type: ignore[arg-type]
        out.add(names, values)
        out.finish()
    assert torch.equal(EmbeddingStore.open(str(tmp_path)).get(names), through_store(values, dtype))  # type: ignore[arg-type]
    assert math.isclose(float((through_store(values, dtype) - values).abs().max()), 0, abs_tol=0.2)  # type: ignore[arg-type]
