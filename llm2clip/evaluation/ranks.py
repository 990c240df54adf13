"""Ranks of the right answer, and the measures made of them.

Ties are broken uniformly at random, in expectation: where t wrong and p right answers have the same
similarity, every order of those t + p is equally likely and each measure is its mean over the orders.
Embeddings that tell nothing apart therefore score exactly chance, neither 0 nor 100 %.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llm2clip.errors import ModelError
from llm2clip.evaluation.bootstrap import RESAMPLES, mean_interval
from llm2clip_kernels import similarity_rank_counts
from llm2clip_kernels.similarity_rank import RankCounts

KS = (1, 5, 10)
# features of equal inputs differ by their own rounding, depending on the batch they were computed in
TIE_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Ranks:
    """For each query, what stands before and beside its best right answer; all int64 (Q,).

    Attributes:
        above: wrong answers with a higher similarity.
        tied_wrong: wrong answers with the same similarity.
        tied_right: right answers with the same similarity, itself included.
        right: right answers in the gallery.
        gallery: size of the gallery.
    """

    above: npt.NDArray[np.int64]
    tied_wrong: npt.NDArray[np.int64]
    tied_right: npt.NDArray[np.int64]
    right: npt.NDArray[np.int64]
    gallery: int

    def expected_rank(self) -> npt.NDArray[np.float64]:
        """Mean rank of the best right answer over all orders of the ties, from 1: float64 (Q,)."""
        # the least of p places drawn from t + p is (t + p + 1) / (p + 1) on average
        return self.above + (self.tied_wrong + self.tied_right + 1) / (self.tied_right + 1)

    def recall(self, k: int) -> npt.NDArray[np.float64]:
        """Probability that a right answer is among the first `k`: float64 (Q,)."""
        return recall_with_ties(self.above, self.tied_wrong, self.tied_right, k)

    def chance(self, k: int) -> npt.NDArray[np.float64]:
        """The same for a random order of the whole gallery (hypergeometric, exact): float64 (Q,)."""
        return recall_with_ties(np.zeros_like(self.right), self.gallery - self.right, self.right, k)

    def reciprocal(self) -> npt.NDArray[np.float64]:
        """Mean of 1 / rank over all orders of the ties: float64 (Q,)."""
        return _reciprocal(self.above, self.tied_wrong, self.tied_right)

    def chance_reciprocal(self) -> npt.NDArray[np.float64]:
        """The same for a random order of the whole gallery: float64 (Q,)."""
        return _reciprocal(np.zeros_like(self.right), self.gallery - self.right, self.right)


def recall_with_ties(
    above: npt.NDArray[np.int64], wrong: npt.NDArray[np.int64], right: npt.NDArray[np.int64], k: int
) -> npt.NDArray[np.float64]:
    """1 - C(wrong, m) / C(wrong + right, m) with m = k - above places left for the tied answers."""
    places = np.clip(k - above, 0, None)
    all_wrong = np.ones(len(above))
    for taken in range(int(places.max(initial=0))):
        still = taken < places
        factor = (wrong - taken) / np.maximum(wrong + right - taken, 1)
        all_wrong = np.where(still, all_wrong * np.clip(factor, 0.0, 1.0), all_wrong)
    return 1.0 - all_wrong


def _reciprocal(
    above: npt.NDArray[np.int64], wrong: npt.NDArray[np.int64], right: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    out = 1 / (above + 1.0)  # where nothing wrong is tied
    tied = np.flatnonzero(wrong)
    cases, inverse = np.unique(np.stack([wrong[tied], right[tied]]), axis=1, return_inverse=True)
    for number, (t, p) in enumerate(cases.T.tolist()):
        places = np.arange(t + 1)
        # P(first right answer at place j) = [t! / (t-j)!] [(t+p-j-1)! / (t+p)!] p, built up by ratios
        ratios = np.ones(t + 1)
        ratios[1:] = (t - places[:-1]) / (t + p - 1 - places[:-1])
        probability = np.cumprod(ratios) * p / (t + p)
        own = tied[inverse.reshape(-1) == number]
        befores, back = np.unique(above[own], return_inverse=True)
        out[own] = np.array([(probability / (before + 1 + places)).sum() for before in befores])[back]
    return out


def group_ids(*columns: Sequence[Hashable]) -> npt.NDArray[np.int64]:
    """Number items so that those which share an entry in any column (and chains of them) share a number.

    Two images of one entity, or two entities with one caption, are each other's right answers: no
    retrieval could tell them apart.
    """
    count = len(columns[0])
    parent = list(range(count))

    def root(item: int) -> int:
        while parent[item] != item:
            parent[item] = parent[parent[item]]
            item = parent[item]
        return item

    for column in columns:
        first: dict[Hashable, int] = {}
        for item, entry in enumerate(column):
            if (other := first.setdefault(entry, item)) != item:
                a, b = root(other), root(item)
                parent[max(a, b)] = min(a, b)
    return np.array([root(item) for item in range(count)], dtype=np.int64)


@torch.no_grad()
def rank_positives(
    queries: Tensor,
    gallery: Tensor,
    query_groups: npt.NDArray[np.int64],
    gallery_groups: npt.NDArray[np.int64],
    *,
    tolerance: float = TIE_TOLERANCE,
) -> Ranks:
    """Rank the best right answer of every query by cosine similarity.

    The counts are `similarity_rank_counts`'s: exact, and no similarity matrix is stored.

    Args:
        queries: (Q, D) embeddings; any norm.
        gallery: (G, D) embeddings.
        query_groups: (Q,); the right answers of a query are the gallery entries of its group.
        gallery_groups: (G,).
        tolerance: similarities that differ by less count as equal.

    Raises:
        ModelError: an embedding has NaN or infinite values (every comparison with NaN would look won).
        ValueError: shapes do not agree, or a query has no right answer in the gallery.
    """
    if len(queries) != len(query_groups) or len(gallery) != len(gallery_groups):
        raise ValueError(
            f"one group per embedding: got {len(queries)} queries with {len(query_groups)} groups and "
            f"{len(gallery)} gallery entries with {len(gallery_groups)}"
        )
    for name, value in (("query", queries), ("gallery", gallery)):
        if not bool(torch.isfinite(value).all()):
            raise ModelError(
                f"a {name} embedding has NaN or infinite values; the model or the store is damaged"
            )
    q = torch.nn.functional.normalize(queries.float(), dim=1)
    g = torch.nn.functional.normalize(gallery.float(), dim=1)
    q_groups, g_groups = (_ids(groups, q.device) for groups in _numbered(query_groups, gallery_groups))
    if not len(q):
        none = np.zeros(0, np.int64)
        return Ranks(none, none, none, none, len(g))
    counts, _ = similarity_rank_counts(
        q, g, x_groups=q_groups, y_groups=g_groups, tolerance=tolerance, directions="rows"
    )
    return ranks_of(counts)


def ranks_of(counts: RankCounts) -> Ranks:
    """The counts of a retrieval op as ranks.

    Raises:
        ValueError: a query has no right answer.
    """
    columns = (counts.above, counts.tied, counts.tied_right, counts.right)
    above, tied_wrong, tied_right, right = (column.cpu().numpy() for column in columns)
    if (right == 0).any():
        raise ValueError(f"{int((right == 0).sum())} queries have no right answer in the gallery")
    return Ranks(above, tied_wrong, tied_right, right, counts.candidates)


def _numbered(
    queries: npt.NDArray[np.int64], gallery: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The groups numbered from 0: below 0 they would mean that an item has none."""
    both = np.concatenate([np.asarray(queries, np.int64), np.asarray(gallery, np.int64)])
    _, numbers = np.unique(both, return_inverse=True)
    return numbers[: len(queries)], numbers[len(queries) :]


def _ids(groups: npt.NDArray[np.int64], device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(groups, np.int64)).to(device)


def summarise(
    ranks: Ranks,
    *,
    ks: Sequence[int] = KS,
    seed: int = 0,
    resamples: int = RESAMPLES,
    clusters: npt.NDArray[np.int64] | None = None,
) -> dict[str, Any]:
    """Measures of one direction as JSON values.

    Args:
        ranks: of every query.
        ks: recall is measured at these.
        seed: of the bootstrap.
        resamples: number of bootstrap samples.
        clusters: (Q,) what each query belongs to, where queries are not independent (captions of one image).

    Returns:
        queries, gallery; `recall`, `chance` and `interval` (95 % bootstrap over queries or clusters) by k as
        string; mrr, chance_mrr, median_rank.
    """
    recall, chance, interval = {}, {}, {}
    for k in ks:
        values = ranks.recall(k)
        recall[str(k)] = float(values.mean())
        chance[str(k)] = float(ranks.chance(k).mean())
        interval[str(k)] = list(mean_interval(values, clusters, resamples=resamples, seed=seed))
    return {
        "queries": len(ranks.above),
        "gallery": ranks.gallery,
        "recall": recall,
        "chance": chance,
        "interval": interval,
        "mrr": float(ranks.reciprocal().mean()),
        "chance_mrr": float(ranks.chance_reciprocal().mean()),
        "median_rank": float(np.median(ranks.expected_rank())),
    }
