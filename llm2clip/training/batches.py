"""The stream of batches that all tasks train on: this rank's share, from an exact position on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llm2clip.data.loader import Loader, Position, Transform
from llm2clip.data.mixture import Mixture
from llm2clip.data.order import SourceBatches
from llm2clip.data.sources import Source
from llm2clip.settings import DataSettings, RunSettings
from llm2clip.training.world import World


def rank_batches(
    source: Source,
    transform: Transform,
    data: DataSettings,
    run: RunSettings,
    world: World,
    start: tuple[int, int],
    *,
    one_source: bool = False,
) -> Iterator[tuple[Position, list[Any]]]:
    """Endless `(position after the batch, transformed samples of this rank)`.

    Args:
        source: samples of all ranks.
        transform: `transform(sample, rng)`, run in the loader's workers.
        data: workers, shuffling window and the share of bad samples that is borne.
        run: global batch size and seed.
        world: this rank.
        start: (epoch, batch) to go on from.
        one_source: every batch comes from one source of a mixture.

    Raises:
        DataError: the source is smaller than one batch, or too many samples cannot be used.
    """
    loader = Loader(
        source,
        batch_size=run.batch_size,
        transform=transform,
        seed=run.seed,
        rank=world.rank,
        world_size=world.size,
        workers=data.workers,
        start=start,
        max_bad_share=data.max_bad_share,
        shuffle_window=data.shuffle_shards,
        one_source=one_source,
    )
    return iter(loader)


def epoch_samples(source: Source, run: RunSettings, *, one_source: bool = False) -> int:
    """Samples of one epoch of `rank_batches`, over all ranks."""
    if one_source and isinstance(source, Mixture):
        return len(SourceBatches(source, run.batch_size))
    return len(source)
