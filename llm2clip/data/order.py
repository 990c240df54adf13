"""The order in which samples are seen: a pure function of seed, epoch, batch and rank."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from llm2clip.data.mixture import Mixture
from llm2clip.data.sources import Source
from llm2clip.errors import DataError

Indices = NDArray[np.int64]


class EpochOrder:
    """Deterministic order of a source's samples for every epoch.

    The source's blocks (shards) are put in random order and samples are shuffled inside windows of
    `window` blocks, so that reading stays close together on disk. A weighted mixture draws
    round(weight * length) samples of each source an epoch, whole passes first when that is more than
    the source has, and spreads the sources evenly over the epoch.

    Args:
        source: what to order.
        seed: same seed, same order.
        shuffle: False keeps the source's own order.
        window: blocks per shuffling window.
    """

    def __init__(self, source: Source, seed: int = 0, shuffle: bool = True, window: int = 16) -> None:
        if window < 1:
            raise DataError(f"the shuffling window must span at least one shard, got {window}")
        self.source, self.seed, self.shuffle, self.window = source, seed, shuffle, window
        weighted = isinstance(source, Mixture) and bool(source.weights)
        self._counts = (
            _shares(source.weights, len(source)) if weighted and isinstance(source, Mixture) else None
        )

    def __len__(self) -> int:
        """Samples per epoch."""
        return len(self.source)

    def indices(self, epoch: int) -> Indices:
        """Indices of all samples of an epoch in order, int64 of shape (len(self),)."""
        rng = np.random.default_rng([self.seed, epoch])
        if self._counts is None:
            return self._pass(self.source.blocks, len(self.source), rng)
        mixture = self.source
        assert isinstance(mixture, Mixture)
        drawn = [
            self._draw(source, start, count, rng)
            for source, start, count in zip(mixture.sources, mixture.starts, self._counts, strict=False)
        ]
        # sample j of n of a source goes near the share (j + u) / n of the epoch
        places = [
            (np.arange(len(part)) + (rng.random(len(part)) if self.shuffle else 0.5)) / max(1, len(part))
            for part in drawn
        ]
        return np.concatenate(drawn)[np.argsort(np.concatenate(places), kind="stable")]

    def _draw(self, source: Source, start: int, count: int, rng: np.random.Generator) -> Indices:
        passes = [
            self._pass(source.blocks, len(source), rng) for _ in range(-(-count // max(1, len(source))))
        ]
        return start + np.concatenate([np.empty(0, np.int64), *passes])[:count]

    def _pass(self, blocks: Sequence[tuple[int, int]], length: int, rng: np.random.Generator) -> Indices:
        if not self.shuffle:
            return np.arange(length, dtype=np.int64)
        order = rng.permutation(len(blocks))
        windows = []
        for first in range(0, len(order), self.window):
            ranges = [
                np.arange(*blocks[number], dtype=np.int64) for number in order[first : first + self.window]
            ]
            windows.append(rng.permutation(np.concatenate(ranges)))
        return np.concatenate(windows) if windows else np.empty(0, np.int64)


class SourceBatches(EpochOrder):
    """An order in which every batch comes from one source of a mixture (LLM2Vec, arXiv 2404.05961, appendix).

    Each source is cut into whole batches anew every epoch, what is left over sits that epoch out, and the batches
    of all sources follow each other in random order. Weights share out the number of batches, whole passes first.

    Args:
        source: a mixture.
        batch_size: samples of a batch over all ranks.
        seed, shuffle, window: as in `EpochOrder`.

    Raises:
        DataError: a source that is to be drawn from is smaller than one batch.
    """

    def __init__(
        self, source: Mixture, batch_size: int, seed: int = 0, shuffle: bool = True, window: int = 16
    ) -> None:
        super().__init__(source, seed, shuffle, window)
        whole = [len(part) // batch_size for part in source.sources]
        batches = _shares(source.weights, sum(whole)) if source.weights else whole
        for part, count, wanted in zip(source.sources, whole, source.weights or whole, strict=True):
            if count < 1 and (wanted > 0 or not source.weights):
                raise DataError(
                    f"{part.name} has {len(part)} samples, fewer than one batch of {batch_size}, and a batch comes "
                    "from one source; lower the batch size, drop the source, or set pairs.one_source=false"
                )
        self._mixture, self._batch_size, self._batches = source, batch_size, batches

    def __len__(self) -> int:
        return sum(self._batches) * self._batch_size

    def indices(self, epoch: int) -> Indices:
        rng = np.random.default_rng([self.seed, epoch])
        drawn = [
            self._cut(source, start, count, rng).reshape(count, self._batch_size)
            for source, start, count in zip(
                self._mixture.sources, self._mixture.starts, self._batches, strict=False
            )
        ]
        batches = np.concatenate(drawn)
        return (batches[rng.permutation(len(batches))] if self.shuffle else batches).reshape(-1)

    def _cut(self, source: Source, start: int, count: int, rng: np.random.Generator) -> Indices:
        """Indices of `count` whole batches; a batch never straddles two passes, so no sample is in it twice."""
        parts: list[Indices] = [np.empty(0, np.int64)]
        left, each = count, len(source) // self._batch_size
        while left > 0:
            taken = min(left, each)
            parts.append(self._pass(source.blocks, len(source), rng)[: taken * self._batch_size])
            left -= taken
        return start + np.concatenate(parts)


def _shares(weights: Sequence[float], total: int) -> list[int]:
    """Whole numbers in the ratio of `weights` that add up to `total` (largest remainders)."""
    exact = [weight / sum(weights) * total for weight in weights]
    counts = [int(value) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda number: counts[number] - exact[number])
    for number in by_remainder[: total - sum(counts)]:
        counts[number] += 1
    return counts


def batch_indices(
    order: EpochOrder, epoch: int, batch_size: int, rank: int = 0, world_size: int = 1
) -> list[Indices]:
    """This rank's part of every global batch of an epoch.

    The global batches do not depend on `world_size`: rank r takes its contiguous slice of each, and the
    last partial batch is left out. So (epoch, batch) names the same place on any number of ranks.
    """
    indices = order.indices(epoch)
    start, stop = rank * batch_size // world_size, (rank + 1) * batch_size // world_size
    return [
        indices[first + start : first + stop] for first in range(0, len(indices) - batch_size + 1, batch_size)
    ]
