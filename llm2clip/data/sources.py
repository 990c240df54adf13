"""Where samples come from: one interface over tar shards, folders, tables and mixtures of them."""

from __future__ import annotations

import difflib
import glob
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Protocol, runtime_checkable

from llm2clip.data.sample import Sample
from llm2clip.errors import BadSampleError, DataError

MAX_MEMBER_BYTES = 256 << 20
CAPTION_FILES = ("captions.jsonl", "captions.csv", "metadata.jsonl", "metadata.csv")
TABLE_SUFFIXES = (".jsonl", ".ndjson", ".csv", ".parquet", ".txt")
_MAX_NAMES, _MAX_BRACES = 1_000_000, 64
_BRACE, _NUMBERS = re.compile(r"\{([^{}]*)\}"), re.compile(r"(\d{1,18})\.\.(\d{1,18})")
_SPLIT = re.compile(r"(?:^|[-_.])(train|training|val|valid|validation|test)(?:[-_.]|$)")
_SPLIT_NAMES = {"training": "train", "valid": "val", "validation": "val"}


@runtime_checkable
class Source(Protocol):
    """Samples with random access; the index is in memory, the content stays on disk."""

    name: str

    def __len__(self) -> int:
        """Number of samples, unusable ones included."""

    def __getitem__(self, index: int) -> Sample:
        """Read one sample; raises BadSampleError when it cannot be used."""

    def captions_of(self, index: int) -> Sample:
        """The same sample with `image=None`, without reading the image."""

    @property
    def blocks(self) -> Sequence[tuple[int, int]]:
        """Ranges [start, stop) of samples that lie together on disk; they cover the source in order."""


@runtime_checkable
class _Stamped(Protocol):
    def image_stamp(self, index: int) -> str: ...


def stamp_of(source: Source, index: int) -> str:
    """A text that changes when a sample's image does, as far as that shows without reading the image.

    Raises:
        DataError: the source cannot tell.
    """
    if not isinstance(source, _Stamped):
        raise DataError(
            f"{source.name} does not tell when an image changes; give the images as shards or files"
        )
    return source.image_stamp(index)


def open_source(
    paths: str | os.PathLike[str] | Sequence[str],
    *,
    weights: Sequence[float] = (),
    limit: int | None = None,
    max_member_bytes: int = MAX_MEMBER_BYTES,
    mixed_splits: bool = False,
) -> Source:
    """Open tar shards, a folder with a captions file, .jsonl, .csv, .parquet or .txt files, or several of these.

    Args:
        paths: each may hold brace ranges (`train-{000000..000012}.tar`) and globs. A directory is a
            folder with `captions.jsonl` or `captions.csv`, or one of tar or parquet shards.
        weights: share of each path in an epoch; empty: by size.
        limit: use only the first so many samples of each path.
        max_member_bytes: larger images or caption files are refused as bad samples.
        mixed_splits: accept a directory that holds training and held-out shards together.

    Raises:
        DataError: a path does not exist (the nearest names are shown), or has nothing that can be read
            (what was found instead is shown).
    """
    from llm2clip.data.mixture import Mixture

    listed = (
        [os.fspath(paths)] if isinstance(paths, (str, os.PathLike)) else [os.fspath(path) for path in paths]
    )
    if not listed:
        raise DataError(
            "no data given; expected paths of tar shards, a folder, .jsonl, .csv or .parquet files"
        )
    if weights and len(weights) != len(listed):
        raise DataError(f"{len(weights)} weights for {len(listed)} sources; give one weight per source")
    if limit is not None and limit < 1:
        raise DataError(f"the limit on samples must be at least 1, got {limit}")
    sources = [_open_one(path, limit, max_member_bytes, mixed_splits) for path in listed]
    return sources[0] if len(sources) == 1 else Mixture(sources, tuple(weights))


def _open_one(path: str, limit: int | None, max_member_bytes: int, mixed_splits: bool) -> Source:
    from llm2clip.data.tabular import CsvSource, JsonlSource, ParquetSource
    from llm2clip.data.tarsource import TarSource
    from llm2clip.data.textsource import TextSource

    files = expand_path(path)
    if len(files) == 1 and files[0].is_dir():
        files = _directory_files(files[0], mixed_splits)
    kinds = sorted({file.suffix.lower() for file in files})
    if len(kinds) > 1:
        raise DataError(
            f"{path} names files of several kinds ({', '.join(kinds)}); give each kind as its own source"
        )
    if kinds == [".tar"]:
        return TarSource(files, name=path, limit=limit, max_member_bytes=max_member_bytes)
    if kinds == [".parquet"]:
        return ParquetSource(files, name=path, limit=limit)
    if kinds == [".csv"]:
        return CsvSource(files, name=path, limit=limit, max_image_bytes=max_member_bytes)
    if kinds in ([".jsonl"], [".ndjson"]):
        return JsonlSource(files, name=path, limit=limit, max_image_bytes=max_member_bytes)
    if kinds == [".txt"]:
        return TextSource(files, name=path, limit=limit)
    raise DataError(
        f"{path} cannot be used as data: expected .tar, .jsonl, .csv, .parquet or .txt, "
        f"got {kinds[0] or 'a file without suffix'}"
    )


def _directory_files(directory: Path, mixed_splits: bool) -> list[Path]:
    for name in CAPTION_FILES:
        if (directory / name).is_file():
            return [directory / name]
    for suffix in (".tar", ".parquet"):
        files = sorted(path for path in directory.iterdir() if path.suffix == suffix and path.is_file())
        if not files:
            continue
        splits = {
            _SPLIT_NAMES.get(found[1], found[1]) for file in files if (found := _SPLIT.search(file.stem))
        }
        if len(splits) > 1 and not mixed_splits:
            # training on such a directory would train on what is held out
            raise DataError(
                f"{directory} holds the splits {', '.join(sorted(splits))} together; name one of them, "
                f"for example {directory}/{re.sub(r'[0-9]+$', '*', files[0].stem)}{suffix}"
            )
        return files
    counts = Counter(path.suffix.lower() or "(no suffix)" for path in directory.iterdir())
    listing = ", ".join(f"{count} {suffix}" for suffix, count in counts.most_common(6)) or "nothing"
    raise DataError(
        f"{directory} has no data that can be read: expected .tar or .parquet shards or "
        f"{' or '.join(CAPTION_FILES[:2])}, found {listing}"
    )


def expand_path(path: str) -> list[Path]:
    """Expand `~`, brace ranges and globs to existing paths, in order and without doubles.

    Raises:
        DataError: something named does not exist.
    """
    path = os.path.expanduser(path)
    if os.path.exists(path):
        return [Path(path)]
    found: dict[Path, None] = {}
    missing: list[str] = []
    for pattern in expand_braces(path):
        matches = sorted(glob.glob(pattern)) if glob.has_magic(pattern) else []
        if not matches and os.path.exists(pattern):
            matches = [pattern]
        if not matches:
            missing.append(pattern)
        found.update(dict.fromkeys(map(Path, matches)))
    if missing:
        more = f" (and {len(missing) - 1} more of {path})" if len(missing) > 1 else ""
        raise DataError(f"{missing[0]} does not exist{more}. {_nearest(missing[0])}")
    return list(found)


def expand_braces(pattern: str) -> list[str]:
    """`a-{08..10}.{x,y}` -> `a-08.x`, `a-08.y`, `a-09.x`, ...; widths with leading zeros are kept.

    Raises:
        DataError: there are more than a million names, or than 64 braces.
    """
    # a few characters may stand for any number of names: counted before, exactly where no brace is inside another
    least = 1 if pattern.count("{") <= _MAX_BRACES else _MAX_NAMES + 1
    for inner in _BRACE.findall(pattern):
        least *= len(span) if (span := _span(inner)) else inner.count(",") + 1
    names = list(islice(_expanded(pattern), _MAX_NAMES + 1)) if least <= _MAX_NAMES else []
    if not 0 < len(names) <= _MAX_NAMES:
        raise DataError(
            f"{pattern[:200]} names more files than the {_MAX_NAMES} allowed, or has more than {_MAX_BRACES} braces; "
            "give a directory or a glob"
        )
    return names


def _span(inner: str) -> range:
    """The numbers of `000..012`, in either direction; none of anything else."""
    found = _NUMBERS.fullmatch(inner)
    if found is None:
        return range(0)
    first, last = int(found[1]), int(found[2])
    step = 1 if last >= first else -1
    return range(first, last + step, step)


def _expanded(pattern: str) -> Iterator[str]:
    match = _BRACE.search(pattern)
    if match is None:
        yield pattern
        return
    inner = match[1]
    span = _span(inner)
    parts: Iterable[str]
    if span:
        first, _, last = inner.partition("..")
        width = len(first) if first.startswith("0") or len(first) == len(last) else 0
        parts = (f"{number:0{width}d}" for number in span)
    elif "," in inner:
        parts = inner.split(",")
    else:
        # a brace that is neither a range nor a list stands for itself
        for rest in _expanded(pattern[match.end() :]):
            yield pattern[: match.end()] + rest
        return
    head, tail = pattern[: match.start()], pattern[match.end() :]
    for part in parts:
        yield from _expanded(head + part + tail)


def _nearest(path: str) -> str:
    """What exists near a missing path, as a sentence."""
    missing = Path(path)
    parent = missing.parent
    name = missing.name
    while not parent.is_dir() and parent != parent.parent:
        name, parent = parent.name, parent.parent
    try:
        present = sorted(entry.name for entry in parent.iterdir())
    except OSError as error:
        return f"Its directory {parent} cannot be read ({error.strerror})."
    close = difflib.get_close_matches(name, present, n=5, cutoff=0.4) or present[:5]
    if not close:
        return f"Its directory {parent} is empty."
    return f"In {parent} there is: {', '.join(close)}"


def caption_fields(source: Source, probe: int = 200) -> Counter[str]:
    """How many of up to `probe` samples, spread over the source, have text in each caption field."""
    step = max(1, len(source) // probe)
    found: Counter[str] = Counter()
    for index in range(0, len(source), step):
        try:
            found.update(source.captions_of(index).captions.keys())
        except BadSampleError:
            continue
    return found


def require_caption_fields(source: Source, fields: Sequence[str], setting: str = "data.captions") -> None:
    """Check that at least one of `fields` has text somewhere in the source.

    Raises:
        DataError: none has; the message lists the fields that are there.
    """
    found = caption_fields(source)
    if not any(name in found for name in fields):
        # rare fields (translations) may be missed by the probe
        found = caption_fields(source, probe=len(source))
    if not any(name in found for name in fields):
        listing = ", ".join(f"{name} ({count})" for name, count in found.most_common(12)) or "none"
        raise DataError(
            f"{source.name} has no text in the caption fields {', '.join(fields)}; fields found: {listing}. "
            f"Set {setting} to some of these."
        )
