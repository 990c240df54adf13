"""The stream of batches that all tasks train on: this rank's share, from an exact position on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch

from llm2clip.data.loader import Collate, Join, Loader, Position, Transform
from llm2clip.data.mixture import Mixture
from llm2clip.data.order import SourceBatches
from llm2clip.data.sources import Source
from llm2clip.settings import DataSettings, RunSettings
from llm2clip.training.world import World

# samples of a worker's task, and the most tasks that a rank's share of a batch is cut into: every task's tensors hold
# file descriptors until the batch is joined
_PIECE, _PIECES = 64, 64
_MOST_WORKERS = 8


def rank_batches(
    source: Source,
    transform: Transform,
    data: DataSettings,
    run: RunSettings,
    world: World,
    start: tuple[int, int],
    *,
    collate: Collate | None = None,
    join: Join | None = None,
    text_only: bool = False,
    one_source: bool = False,
) -> Iterator[tuple[Position, Any]]:
    """Endless `(position after the batch, transformed samples of this rank)`.

    Args:
        source: samples of all ranks.
        transform: `transform(sample, rng)`, run in the loader's workers.
        data: workers, shuffling window and the share of bad samples that is borne.
        run: global batch size and seed.
        world: this rank.
        start: (epoch, batch) to go on from.
        collate, join: make the batch of pieces that the workers joined; without them it is the list of samples.
        text_only: read captions without images.
        one_source: every batch comes from one source of a mixture.

    Raises:
        DataError: the source is smaller than one batch, or too many samples cannot be used.
    """
    share = -(-run.batch_size // world.size)
    loader = Loader(
        source,
        batch_size=run.batch_size,
        transform=transform,
        collate=collate,
        piece=max(_PIECE, -(-share // _PIECES)) if join else 0,
        join=join,
        pin=collate is not None and world.device.type == "cuda",
        seed=run.seed,
        rank=world.rank,
        world_size=world.size,
        workers=_workers(data.workers, world),
        start=start,
        max_bad_share=data.max_bad_share,
        shuffle_window=data.shuffle_shards,
        text_only=text_only,
        one_source=one_source,
    )
    return iter(loader)


def epoch_samples(source: Source, run: RunSettings, *, one_source: bool = False) -> int:
    """Samples of one epoch of `rank_batches`, over all ranks."""
    if one_source and isinstance(source, Mixture):
        return len(SourceBatches(source, run.batch_size))
    return len(source)


def _workers(wanted: int | None, world: World) -> int:
    if wanted is not None:
        return wanted
    if world.device.type != "cuda":
        return 0
    ranks_here = max(1, min(world.size, torch.cuda.device_count()))
    return max(1, min(_MOST_WORKERS, len(os.sched_getaffinity(0)) // ranks_here))
