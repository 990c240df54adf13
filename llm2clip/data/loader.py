"""Batches of transformed samples, exactly repeatable and resumable, with or without worker processes."""

from __future__ import annotations

import logging
import pickle
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from llm2clip.data.mixture import Mixture
from llm2clip.data.order import EpochOrder, SourceBatches, batch_indices
from llm2clip.data.sample import Sample
from llm2clip.data.sources import Source
from llm2clip.data.workers import batches_of
from llm2clip.errors import BadSampleError, DataError

log = logging.getLogger("llm2clip.data")

Transform: TypeAlias = Callable[[Sample, np.random.Generator], Any]
Collate: TypeAlias = Callable[[list[Any]], Any]
Join: TypeAlias = Callable[[list[Any]], Any]
Request: TypeAlias = list[tuple[int, int]]  # (epoch, index) of the samples of a piece
# fewer samples say nothing about the share of bad ones
MIN_SAMPLES_FOR_SHARE = 50
NAMED_IN_ERROR = 10


@dataclass(frozen=True, order=True)
class Position:
    """A place in the stream of batches: `batch` batches of `epoch` are done."""

    epoch: int = 0
    batch: int = 0


@dataclass(slots=True)
class BadSamples:
    """What could not be used so far, on this rank."""

    seen: int = 0
    bad: int = 0
    reasons: dict[str, str] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """Share of the samples read that could not be used."""
        return self.bad / self.seen if self.seen else 0.0

    def add(self, key: str, reason: str) -> None:
        """Count a bad sample; each is named in the log once."""
        self.bad += 1
        if key not in self.reasons:
            self.reasons[key] = reason
            log.warning("skipped sample %s: %s", key, reason)

    def check(self, source: str, max_share: float) -> None:
        """Raise DataError once more than `max_share` of at least 50 samples are bad."""
        if self.seen < MIN_SAMPLES_FOR_SHARE or self.share <= max_share:
            return
        first = "; ".join(f"{key}: {why}" for key, why in list(self.reasons.items())[:NAMED_IN_ERROR])
        raise DataError(
            f"{self.bad} of {self.seen} samples read from {source} cannot be used ({100 * self.share:.1f} %, "
            f"allowed are {100 * max_share:.1f} %). First: {first}. Repair the data "
            "(`llm2clip data check` names all) or raise data.max_bad_share."
        )


class Loader:
    """Iterates over `(position, items)`; `position` is what to resume from after the batch.

    `items` is the list of what `transform` returned for this rank's part of the global batch, or
    `collate(items)`, or with `piece` what `join` makes of several such. A sample whose reading or transform
    raises BadSampleError is left out of its batch and counted in `bad`. The random numbers of a sample come
    from (seed, epoch, index) alone: batches are the same for any number of workers and after any resume.

    Args:
        source: the samples.
        batch_size: samples per batch over all ranks.
        transform: `transform(sample, rng)`, run in the worker; may raise BadSampleError.
        collate: joins the items of a batch in the worker; with tensors much cheaper to send than items.
        piece: at most so many samples are one worker's task; 0: the whole part of a rank. Small pieces keep all
            workers busy on one batch and bound what waits in memory; needs `collate` and `join`.
        join: makes a batch of the collated pieces of which something is left, in order.
        pin: give tensors in page-locked memory, for the transfer to a GPU; collated items then have `pin_memory()`.
        seed: of order and transform.
        rank: number of this process.
        world_size: number of processes.
        workers: reading processes; 0 reads in a thread of this one, a batch ahead.
        start: (epoch, batch) to begin at.
        epochs: epoch at which the stream ends; None never ends.
        max_bad_share: stop with DataError past this share of bad samples.
        shuffle: False keeps the source's order.
        shuffle_window: shards per shuffling window.
        text_only: read captions without images.
        one_source: every batch comes from one source of a mixture (`order.SourceBatches`).

    Raises:
        DataError: the source is smaller than one batch, or an argument is out of range.
    """

    def __init__(
        self,
        source: Source,
        batch_size: int,
        transform: Transform,
        *,
        collate: Collate | None = None,
        piece: int = 0,
        join: Join | None = None,
        pin: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        start: tuple[int, int] | Position = (0, 0),
        epochs: int | None = None,
        max_bad_share: float = 0.05,
        shuffle: bool = True,
        shuffle_window: int = 16,
        text_only: bool = False,
        one_source: bool = False,
    ) -> None:
        if not 0 <= rank < world_size:
            raise DataError(f"rank must be in [0, {world_size}), got {rank}")
        if batch_size < world_size:
            raise DataError(
                f"the batch of {batch_size} samples is smaller than the {world_size} ranks that share it"
            )
        if len(source) < batch_size:
            raise DataError(
                f"{source.name} has {len(source)} samples, fewer than one batch of {batch_size}; "
                "lower the batch size or add data"
            )
        if workers < 0 or not 0.0 <= max_bad_share <= 1.0:
            raise DataError(
                f"workers must be >= 0 and max_bad_share in [0, 1], got {workers} and {max_bad_share}"
            )
        if piece < 0 or (piece > 0) != (join is not None) or (piece and collate is None):
            raise DataError("pieces of a batch need `collate`, `join`, and a size above 0")
        self.order = (
            SourceBatches(source, batch_size, seed, shuffle, shuffle_window)
            if one_source and isinstance(source, Mixture)
            else EpochOrder(source, seed, shuffle, shuffle_window)
        )
        self.steps_per_epoch = len(self.order) // batch_size
        self.bad = BadSamples()
        self._source, self._batch_size, self._workers = source, batch_size, workers
        self._rank, self._world_size = rank, world_size
        share = (rank + 1) * batch_size // world_size - rank * batch_size // world_size
        self._piece, self._join, self._pin = piece or share, join, pin
        self._pieces = -(-share // self._piece)
        epoch, batch = (start.epoch, start.batch) if isinstance(start, Position) else start
        # the end of an epoch is the beginning of the next
        self._start = Position(epoch + batch // self.steps_per_epoch, batch % self.steps_per_epoch)
        self._epochs, self._max_bad_share = epochs, max_bad_share
        self._reader = _Reader(source, transform, collate, seed, text_only, pack=workers > 0)

    def __iter__(self) -> Iterator[tuple[Position, Any]]:
        if self._workers == 0:
            results: Iterator[_Result] = _ahead(self._reader.__getitems__, self._requests(), self._pieces)
        else:
            results = batches_of(
                DataLoader(
                    self._reader,
                    batch_sampler=_Requests(self),
                    num_workers=self._workers,
                    collate_fn=_same,
                    # a batch ahead while the one before is trained on
                    prefetch_factor=max(2, -(-self._pieces // self._workers) + 1),
                    pin_memory=self._pin,
                    # the default generator would lose a number here, and with it the exact resume
                    generator=torch.Generator(),
                )
            )
        for position in self._positions():
            pieces = [self._checked(next(results)) for _ in range(self._pieces)]
            if self._join is None:
                yield position, pieces[0]
            else:
                left = [piece for piece in pieces if len(piece)]
                yield position, self._join(left) if left else []

    def _checked(self, result: _Result) -> Any:
        """The items of a result, whose bad samples are counted."""
        if result.error is not None:
            raise result.error
        self.bad.seen += result.seen
        for key, reason in result.bad:
            self.bad.add(key, reason)
        self.bad.check(self._source.name, self._max_bad_share)
        return pickle.loads(result.packed) if result.packed else result.items

    def _epoch_starts(self) -> Iterator[tuple[int, int]]:
        epoch, batch = self._start.epoch, self._start.batch
        while self._epochs is None or epoch < self._epochs:
            yield epoch, batch
            epoch, batch = epoch + 1, 0

    def _positions(self) -> Iterator[Position]:
        for epoch, first in self._epoch_starts():
            for batch in range(first + 1, self.steps_per_epoch + 1):
                yield Position(epoch + 1, 0) if batch == self.steps_per_epoch else Position(epoch, batch)

    def _requests(self) -> Iterator[Request]:
        for epoch, first in self._epoch_starts():
            batches = batch_indices(self.order, epoch, self._batch_size, self._rank, self._world_size)
            for indices in batches[first:]:
                requests = [(epoch, int(index)) for index in indices]
                for start in range(0, len(requests), self._piece):
                    yield requests[start : start + self._piece]


@dataclass(slots=True)
class _Result:
    seen: int
    items: Any
    bad: list[tuple[str, str]]
    packed: bytes = b""
    error: Exception | None = None

    def pin_memory(self) -> _Result:
        """Called by torch's pinning thread; packed items have nothing to pin."""
        if hasattr(self.items, "pin_memory"):
            self.items = self.items.pin_memory()
        return self


class _Reader(Dataset[Any]):
    """Reads and transforms the samples of one batch; a worker process holds a copy of it."""

    def __init__(
        self,
        source: Source,
        transform: Transform,
        collate: Collate | None,
        seed: int,
        text_only: bool,
        pack: bool,
    ) -> None:
        self._source, self._transform, self._collate = source, transform, collate
        self._seed, self._text_only = seed, text_only
        # every tensor a worker returns costs a file descriptor here; lists of them go as plain bytes instead
        self._pack = pack and collate is None

    def __getitem__(self, request: tuple[int, int]) -> Any:
        epoch, index = request
        sample = self._source.captions_of(index) if self._text_only else self._source[index]
        return self._transform(sample, np.random.default_rng([self._seed, epoch, index]))

    def __getitems__(self, requests: list[tuple[int, int]]) -> _Result:
        items: list[Any] = []
        bad: list[tuple[str, str]] = []
        try:
            for request in requests:
                try:
                    items.append(self[request])
                except BadSampleError as error:
                    bad.append((error.key, error.reason))
            joined = self._collate(items) if self._collate is not None and items else items
            if self._pack:
                return _Result(len(requests), None, bad, pickle.dumps(joined, protocol=5))
            return _Result(len(requests), joined, bad)
        except Exception as error:
            # raised again in the main process with its own class, which torch's wrapper would not keep
            if not self._pack and self._collate is None:
                raise
            return _Result(len(requests), None, [], error=error)


class _Requests:
    """The batch sampler torch asks for; `iter()` of it begins at the loader's start."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[Request]:
        return self._loader._requests()


def _ahead(read: Callable[[Request], _Result], requests: Iterator[Request], count: int) -> Iterator[_Result]:
    """Results of `read` in order, made by a thread that is `count` requests ahead."""
    pool = ThreadPoolExecutor(1, "read")
    waiting: deque[Future[_Result]] = deque()
    try:
        for request in requests:
            waiting.append(pool.submit(read, request))
            if len(waiting) > count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _same(result: Any) -> Any:
    return result
