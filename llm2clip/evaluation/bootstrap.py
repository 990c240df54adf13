"""Confidence intervals by bootstrap, exact in distribution and cheap for any number of queries.

What is resampled are clusters: the captions of one image stand or fall together, and drawing them one by one would
make intervals too narrow (Davison and Hinkley, Bootstrap Methods and their Application, 1997, section 3.8). A
resample only needs to know how often each kind of cluster was drawn, which is multinomial over the few kinds that
exist; so a million queries take no more memory than a thousand.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

RESAMPLES = 1000
LEVEL = 95.0  # percent
# counts drawn at a time: 128 MiB
_DRAWS = 1 << 24

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Difference:
    """Mean of one measure less that of another over the same queries, with its 95 % interval."""

    mean: float
    low: float
    high: float

    @property
    def certain(self) -> bool:
        """True when the interval leaves 0 out."""
        return self.low > 0 or self.high < 0


def mean_interval(
    values: npt.ArrayLike,
    clusters: npt.NDArray[np.int64] | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float]:
    """95 % percentile interval of the mean of `values`.

    Args:
        values: (Q,) one measure per query.
        clusters: (Q,) id of what each query belongs to; None: every query stands for itself.
        resamples: number of bootstrap samples.
        seed: of the random numbers.

    Raises:
        ValueError: there are no values, or not one cluster for each.
    """
    means = _resampled_means(np.asarray(values, np.float64), clusters, resamples, seed)
    low, high = np.percentile(means, [50 - LEVEL / 2, 50 + LEVEL / 2])
    return float(low), float(high)


def paired_difference(
    first: npt.ArrayLike,
    second: npt.ArrayLike,
    clusters: npt.NDArray[np.int64] | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Difference:
    """mean(first) - mean(second) of two models on the same queries; both are resampled together.

    Pairing takes out what makes a query hard for both, so that differences far smaller than the interval of
    either mean can be certain.

    Raises:
        ValueError: the two do not have one value for each query.
    """
    left, right = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if left.shape != right.shape:
        raise ValueError(f"a pair of values per query is needed, got {left.shape} and {right.shape}")
    difference = left - right
    low, high = mean_interval(difference, clusters, resamples=resamples, seed=seed)
    return Difference(float(difference.mean()), low, high)


def _resampled_means(
    values: Floats, clusters: npt.NDArray[np.int64] | None, resamples: int, seed: int
) -> Floats:
    if values.ndim != 1 or not len(values):
        raise ValueError(f"expected one value per query and at least one query, got shape {values.shape}")
    if clusters is not None and len(clusters) != len(values):
        raise ValueError(f"{len(values)} values with {len(clusters)} clusters; give one cluster per value")
    if clusters is None:
        kinds, counts = np.unique(values, return_counts=True)
        sums, sizes = kinds, np.ones_like(kinds)
    else:
        _, place = np.unique(clusters, return_inverse=True)
        totals = np.stack([np.bincount(place, values), np.bincount(place)])
        kinds, counts = np.unique(totals, axis=1, return_counts=True)
        sums, sizes = kinds
    drawn = int(counts.sum())
    rng = np.random.default_rng(seed)
    step = max(1, _DRAWS // len(counts))
    means = []
    for start in range(0, resamples, step):
        times = rng.multinomial(drawn, counts / drawn, size=min(step, resamples - start))
        means.append((times @ sums) / (times @ sizes))
    return np.concatenate(means)
