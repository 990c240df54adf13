"""Retrieval on the package's own kinds of sources: tar shards, folders, .jsonl, .csv, .parquet; and on OpenStax."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping, Sequence

import numpy as np

from llm2clip.data.sample import Sample, caption_role
from llm2clip.data.sources import Source, open_source, require_caption_fields
from llm2clip.errors import BadSampleError, DataError
from llm2clip.evaluation.datasets.base import CaptionSet, Request, RetrievalData
from llm2clip.progress import Progress
from llm2clip.settings import CaptionSettings, DataSettings

_BAD_SHARE_FROM = 50  # samples to see before the share of bad ones means anything


class SourceImages:
    """Images of some samples of a source.

    Args:
        source: where they are.
        rows: index of each image's sample.
        keys: its name.
    """

    def __init__(self, source: Source, rows: Sequence[int], keys: Sequence[str]) -> None:
        self._source, self._rows, self._keys = source, rows, keys

    def __len__(self) -> int:
        return len(self._rows)

    def key(self, row: int) -> str:
        return self._keys[row]

    def read(self, row: int) -> bytes:
        data = self._source[self._rows[row]].image
        if data is None:
            raise BadSampleError(self._keys[row], "it has no image")
        return data

    def identity(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for key in self._keys:
            digest.update(key.encode("utf-8", "surrogateescape") + b"\n")
        return digest.hexdigest()

    def missing(self) -> list[str]:
        return []


def open_own(data: DataSettings) -> RetrievalData:
    """The samples of `data.val`, the first of each group, with their short, long and translated captions.

    Raises:
        DataError: none of the caption fields has text (lists those found), or too many samples cannot be read.
    """
    captions = data.captions
    fields: dict[str, Sequence[str]] = {"short": captions.short, "long": captions.long}
    fields |= {language: (name,) for language, name in captions.translations.items()}
    source = open_source(data.val, limit=data.limit)
    require_caption_fields(source, [name for names in fields.values() for name in names])
    return _collect(source, "data", "own data", fields, data.max_bad_share)


def open_strangers(paths: Sequence[str]) -> SourceImages:
    """Every image of some sources, to fill a gallery with."""
    source = open_source(paths)
    return SourceImages(source, range(len(source)), [f"{source.name}:{row}" for row in range(len(source))])


def open_openstax(request: Request) -> RetrievalData:
    """Held-out OpenStax figures: captions (short), long descriptions (long), Spanish and Polish ones.

    Raises:
        DataError: there are no shards of that split.
    """
    split = request.split or "val"
    patterns = (f"{split}-*.tar", f"openstax-{split}-*.tar", f"data/{split}-*.tar")
    found = [request.root / pattern for pattern in patterns if any(request.root.glob(pattern))]
    if not found:
        raise DataError(f"{request.root} has no shards {' or '.join(patterns)}")
    captions = CaptionSettings()
    fields: dict[str, Sequence[str]] = {"short": captions.short, "long": captions.long}
    fields |= {language: (f"{language}.alt", f"{language}.caption") for language in ("es", "pl")}
    return _collect(open_source(found[0]), "openstax", "OpenStax", fields, 0.0)


def _collect(
    source: Source, name: str, title: str, fields: Mapping[str, Sequence[str]], max_bad_share: float
) -> RetrievalData:
    rows: list[int] = []
    keys: list[str] = []
    texts: dict[str, list[str]] = {kind: [] for kind in fields}
    owner: dict[str, list[int]] = {kind: [] for kind in fields}
    groups: set[str] = set()
    bad: list[str] = []
    credits: dict[str, dict[str, None]] = {"license": {}, "attribution": {}, "book": {}}
    # reading captions takes seconds a hundred thousand: small sets need no progress
    with Progress(len(source), "reading captions", "samples", enabled=len(source) > 100_000) as shown:
        for index in shown.track(range(len(source))):
            try:
                sample = source.captions_of(index)
            except BadSampleError as problem:
                bad.append(str(problem))
                if index + 1 >= _BAD_SHARE_FROM and len(bad) > max_bad_share * (index + 1):
                    raise _too_many(bad, index + 1, max_bad_share) from None
                continue
            own = {kind: text for kind, names in fields.items() if (text := caption_role(sample, names))}
            if not own or sample.group in groups:
                continue
            groups.add(sample.group)
            for kind, text in own.items():
                texts[kind].append(text)
                owner[kind].append(len(rows))
            rows.append(index)
            keys.append(sample.key)
            _add_credits(credits, sample)
    if len(bad) > max_bad_share * len(source):
        raise _too_many(bad, len(source), max_bad_share)
    for reason in bad[:10]:
        print(f"skipped {reason}", file=sys.stderr)
    sets = [
        CaptionSet(kind, texts[kind], np.array(owner[kind], np.int64))
        for kind in fields
        if len(texts[kind]) >= 2
    ]
    if not sets:
        raise DataError(
            f"{source.name}: no kind of caption has two samples of different groups; check data.captions"
        )
    meta = {field: list(values) for field, values in credits.items() if values}
    return RetrievalData(name, title, SourceImages(source, rows, keys), sets, equal_match=True, meta=meta)


def _add_credits(credits: dict[str, dict[str, None]], sample: Sample) -> None:
    for field, values in credits.items():
        value = sample.meta.get(field)
        if isinstance(value, str) and value and len(values) < 12:
            values.setdefault(value)


def _too_many(bad: Sequence[str], seen: int, share: float) -> DataError:
    return DataError(
        f"{len(bad)} of the first {seen} held-out samples cannot be read, more than max_bad_share = {share}. "
        "The first:\n  " + "\n  ".join(bad[:10])
    )
