"""What is measured of caption embeddings: retrieval both ways, alignment and uniformity, rank correlation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llm2clip.data.store_format import decode_rows, encode_rows
from llm2clip.evaluation.bootstrap import LEVEL, RESAMPLES
from llm2clip.evaluation.caption_retrieval import CaptionPairs
from llm2clip.evaluation.ranks import Ranks, group_ids, rank_positives
from llm2clip.settings import StoreDtype
from llm2clip_kernels.similarity_lse import similarity_lse_with_positives

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class PairRanks:
    """Ranks of the right captions, in both directions, queries in the order of the pairs."""

    forward: Ranks
    backward: Ranks


def rank_pairs(
    first: Tensor, second: Tensor, pairs: CaptionPairs, *, shared: Literal["wrong", "right"]
) -> PairRanks:
    """Rank every caption's partner among all captions of the other side, by cosine similarity.

    Args:
        first, second: (n, D) embeddings of `pairs.first` and `pairs.second`.
        pairs: the captions.
        shared: whether an image that has the very text of a right caption is right too.
    """
    groups = np.arange(len(first)) if shared == "wrong" else group_ids(pairs.first, pairs.second)
    return PairRanks(
        rank_positives(first, second, groups, groups), rank_positives(second, first, groups, groups)
    )


def alignment(first: Tensor, second: Tensor) -> float:
    """Mean squared distance of the unit-norm embeddings of pairs (Wang and Isola, ICML 2020, with alpha = 2).

    Args:
        first, second: (n, D) embeddings; any norm.
    """
    x, y = (torch.nn.functional.normalize(side.double(), dim=1) for side in (first, second))
    return float((x - y).pow(2).sum(1).mean())


def uniformity(embeddings: Tensor) -> float:
    """log of the mean of exp(-2 |x - y|²) over different rows of unit norm (Wang and Isola, ICML 2020, t = 2).

    0 where all are one point; about -4 for many points spread over a sphere of many dimensions. Computed from row sums
    of exp(4 · cosine), so no matrix is stored.

    Args:
        embeddings: (n, D) of one side of the pairs; any norm, n >= 2.
    """
    unit = torch.nn.functional.normalize(embeddings.float(), dim=1)
    count = len(unit)
    alone = torch.arange(count)  # a row is no partner of itself
    row_lse, *_ = similarity_lse_with_positives(
        unit, unit, 4.0, directions="rows", x_groups=alone, y_groups=alone
    )
    # |x - y|² = 2 - 2 cos, so exp(-2 |x - y|²) = exp(4 cos - 4)
    return float(row_lse.double().logsumexp(0)) - math.log(count * (count - 1)) - 4


def through_store(embeddings: Tensor, dtype: StoreDtype) -> Tensor:
    """Embeddings (n, D) as a store of this precision returns them."""
    arrays = encode_rows(embeddings, dtype)
    return decode_rows(arrays["embeddings"].copy(), arrays.get("scales"), dtype)


def cosine_of_pairs(first: Tensor, second: Tensor) -> Floats:
    """(n,) float64 cosine similarity of rows that belong together."""
    values: Floats = torch.nn.functional.cosine_similarity(first.double(), second.double(), dim=1).numpy()
    return values


def spearman(values: npt.ArrayLike, scores: npt.ArrayLike) -> float:
    """Spearman's rank correlation; equal values share the mean of their ranks. 0 where one side is constant."""
    x, y = (_fractional_ranks(np.asarray(v, np.float64)) for v in (values, scores))
    x, y = x - x.mean(), y - y.mean()
    norm = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / norm if norm > 0 else 0.0


def spearman_intervals(
    values: Sequence[Floats], scores: Floats, *, resamples: int = RESAMPLES, seed: int = 0
) -> list[Floats]:
    """Spearman's correlation over bootstrap samples of the pairs, the same samples for every encoder.

    Args:
        values: for each encoder (n,) similarities.
        scores: (n,) human scores.
        resamples: number of samples.
        seed: of the random numbers.

    Returns:
        For each encoder (resamples,) correlations.
    """
    rng = np.random.default_rng(seed)
    out = [np.empty(resamples) for _ in values]
    for sample in range(resamples):
        drawn = rng.integers(0, len(scores), len(scores))
        for found, own in zip(out, values, strict=True):
            found[sample] = spearman(own[drawn], scores[drawn])
    return out


def percentile_interval(samples: Floats) -> list[float]:
    """The 95 % percentile interval of bootstrap samples."""
    low, high = np.percentile(samples, [50 - LEVEL / 2, 50 + LEVEL / 2])
    return [float(low), float(high)]


def _fractional_ranks(values: Floats) -> Floats:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    ranks: Floats = (ends - (counts - 1) / 2)[inverse]
    return ranks
