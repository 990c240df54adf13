"""The captions of a data set as a stream, and which of them a rank has to embed.

Tens of millions of captions do not fit in memory as text (200 to 400 bytes each), so they are read twice: once for
their addresses (16 bytes for each different one), once to be embedded.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from llm2clip.data.sample import Sample
from llm2clip.data.sources import open_source
from llm2clip.data.store_lookup import AddressTable, Digests, different, digest_array
from llm2clip.errors import BadSampleError, ConfigError, DataError
from llm2clip.progress import Progress
from llm2clip.settings import CaptionSettings, DataSettings

_BAD_SHARE_FROM = 50  # samples to see before the share of bad ones means anything
_CHUNK = 8192  # captions hashed at once
_SORT_FROM = 1 << 20  # addresses gathered before doubles are dropped


def caption_fields(captions: CaptionSettings, *, translations: bool = False) -> tuple[str, ...]:
    """Fields that play a role, each once."""
    fields = [field for role in captions.all_roles.values() for field in role]
    extra = tuple(captions.translations.values()) if translations else ()
    return tuple(dict.fromkeys((*fields, *extra)))


class CaptionStream:
    """Every caption that training or evaluation may ask for, as often as the data holds it.

    Captions of every role of `data.train` and `data.val`; translations of `data.val` alone, since only the
    cross-lingual tables read them. All texts of a field count, not just the first.

    Args:
        data: the sources.

    Attributes:
        bad: samples of the last pass that could not be read.

    Raises:
        ConfigError: neither training nor held-out sources are given.
    """

    def __init__(self, data: DataSettings) -> None:
        if not data.train and not data.val:
            raise ConfigError(
                "data.train and data.val are both empty; name the sources whose captions to embed"
            )
        self._data = data
        parts = (
            (data.train, caption_fields(data.captions)),
            (data.val, caption_fields(data.captions, translations=True)),
        )
        self._parts = [(open_source(paths, limit=data.limit), fields) for paths, fields in parts if paths]
        self.bad = 0

    def read(self, *, progress: bool = False) -> Iterator[str]:
        """One pass over the data.

        Args:
            progress: show it, and name the first ten samples that cannot be read.

        Raises:
            DataError: more than `data.max_bad_share` of a source's samples cannot be read.
        """
        self.bad = 0
        for source, fields in self._parts:
            bad: list[str] = []
            with Progress(len(source), "reading captions", "samples", enabled=progress) as shown:
                for index in shown.track(range(len(source))):
                    try:
                        sample = source.captions_of(index)
                    except BadSampleError as problem:
                        self._note(bad, str(problem), index + 1, progress)
                        continue
                    yield from _texts(sample, fields)

    def _note(self, bad: list[str], problem: str, seen: int, progress: bool) -> None:
        self.bad += 1
        bad.append(problem)
        if progress and len(bad) <= 10:
            print(f"skipped {problem}", file=sys.stderr)
        if seen >= _BAD_SHARE_FROM and len(bad) > self._data.max_bad_share * seen:
            raise DataError(
                f"{len(bad)} of the first {seen} samples cannot be read, more than "
                f"data.max_bad_share = {self._data.max_bad_share}. The first:\n  " + "\n  ".join(bad[:10])
            )


def _texts(sample: Sample, fields: Sequence[str]) -> Iterator[str]:
    for field in fields:
        yield from sample.captions.get(field, ())


@dataclass(frozen=True)
class Census:
    """What one rank found on its first pass.

    Attributes:
        captions: captions in the data, doubles included; the same on every rank.
        bad: samples that could not be read.
        own: addresses (n, 2) of the different captions in this rank's share.
    """

    captions: int
    bad: int
    own: Digests


def take_census(
    stream: CaptionStream, captions: CaptionSettings, *, rank: int = 0, size: int = 1, progress: bool = False
) -> Census:
    """Find the captions of a rank: those whose address is `rank` modulo `size`, so that no caption is two ranks'.

    Raises:
        DataError: no caption was found, or too many samples cannot be read.
    """
    count = 0
    unique: Digests = np.empty((0, 2), np.uint64)
    gathered: list[Digests] = []
    for texts in batched(stream.read(progress=progress), _CHUNK):
        count += len(texts)
        digests = digest_array(texts)
        gathered.append(digests[digests[:, 1] % np.uint64(size) == rank])
        if sum(map(len, gathered)) > max(_SORT_FROM, len(unique)):
            unique, gathered = different([unique, *gathered]), []
    if not count:
        wanted = ", ".join(caption_fields(captions, translations=True)) or "none"
        raise DataError(
            f"the data holds no caption under the fields asked for ({wanted}); set data.captions.short and "
            "data.captions.long to fields of your data (`llm2clip data check` lists them)"
        )
    return Census(count, stream.bad, different([unique, *gathered]))


class Wanted:
    """A set of captions, known by their addresses (n, 2), that are to be met once each in a stream."""

    def __init__(self, digests: Digests) -> None:
        self._table = AddressTable.build(digests, np.arange(len(digests)))
        self._met = np.zeros(len(digests), bool)

    def __len__(self) -> int:
        return len(self._met)

    @property
    def left(self) -> int:
        """How many were not met yet."""
        return len(self) - int(self._met.sum())

    def windows(self, texts: Iterable[str], size: int) -> Iterator[list[str]]:
        """The wanted captions among `texts` in lists of `size`, the last one shorter."""
        return (list(window) for window in batched(self._new(texts), size))

    def _new(self, texts: Iterable[str]) -> Iterator[str]:
        left = self.left
        for chunk in batched(texts, _CHUNK):
            if not left:
                return
            place = self._table.find(digest_array(chunk))
            new = np.flatnonzero(place >= 0)
            _, first = np.unique(place[new], return_index=True)
            new = np.sort(new[first])
            new = new[~self._met[place[new]]]
            self._met[place[new]] = True
            left -= len(new)
            yield from (chunk[position] for position in new.tolist())


def batched(items: Iterable[str], size: int) -> Iterator[tuple[str, ...]]:
    """Tuples of `size` items, the last one shorter."""
    iterator = iter(items)
    while batch := tuple(itertools.islice(iterator, size)):
        yield batch
