"""Several sources as one."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

from llm2clip.data.sample import Sample
from llm2clip.data.sources import Source, stamp_of
from llm2clip.errors import DataError


class Mixture:
    """The samples of all `sources`, one source after the other.

    Weights do not change the indices; they say how an epoch draws from them (`loader.EpochOrder`).

    Args:
        sources: at least one.
        weights: relative share of each source in an epoch; empty: by size.

    Raises:
        DataError: a weight is negative or not finite, or all are zero.
    """

    def __init__(self, sources: Sequence[Source], weights: tuple[float, ...] = ()) -> None:
        if any(not 0.0 <= weight < float("inf") for weight in weights) or (weights and sum(weights) <= 0):
            raise DataError(
                f"weights of a mixture must be finite, not negative and not all zero, got {weights}"
            )
        self.sources = tuple(sources)
        self.weights = weights
        self.name = " + ".join(source.name for source in sources)
        self.starts = [0]
        for source in sources:
            self.starts.append(self.starts[-1] + len(source))
        self._blocks = [
            (start + first, start + last)
            for source, start in zip(sources, self.starts, strict=False)
            for first, last in source.blocks
        ]

    def __len__(self) -> int:
        return self.starts[-1]

    @property
    def blocks(self) -> Sequence[tuple[int, int]]:
        return self._blocks

    def __getitem__(self, index: int) -> Sample:
        source, local = self._locate(index)
        return source[local]

    def captions_of(self, index: int) -> Sample:
        source, local = self._locate(index)
        return source.captions_of(local)

    def image_stamp(self, index: int) -> str:
        """As the source that the sample is from says it."""
        source, local = self._locate(index)
        return stamp_of(source, local)

    def _locate(self, index: int) -> tuple[Source, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        number = bisect.bisect_right(self.starts, index) - 1
        return self.sources[number], index - self.starts[number]
