"""WebDataset tar shards as a map-style source."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm2clip.data.sample import Sample, parse_json_record, sample_from_record
from llm2clip.data.shards import TarIndex, index_tar
from llm2clip.errors import BadSampleError, DataError
from llm2clip.files import file_state

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
# file descriptors kept open per process; reopening is cheap
MAX_OPEN_SHARDS = 64


@dataclass(slots=True)
class _Entry:
    """Where the parts of one sample lie; `reason` is set instead when it cannot be used."""

    shard: int
    stem: str
    image: tuple[int, int] | None = None
    record: tuple[int, int] | None = None
    texts: tuple[tuple[str, int, int], ...] = ()
    reason: str = ""


class TarSource:
    """Samples of WebDataset shards: members that share a name up to the first dot.

    `jpg|jpeg|png|webp` is the image, `json` its fields, `txt` the caption `caption` and `<field>.txt` the
    caption `<field>`; other members are ignored. Members are read where they lie (`os.pread`). Links,
    names that leave the archive, members over `max_member_bytes` and the cut end of a shard are samples
    that raise BadSampleError.

    Args:
        paths: the shards, in order.
        name: how the user named them.
        limit: use only the first so many samples.
        max_member_bytes: largest image or caption file.

    Raises:
        DataError: no shard has a sample that could be used.
    """

    def __init__(
        self, paths: Sequence[Path], *, name: str, limit: int | None = None, max_member_bytes: int = 256 << 20
    ) -> None:
        self.name = name
        self._paths = [os.fspath(path) for path in paths]
        self._labels = _labels(self._paths)
        self._max_member_bytes = max_member_bytes
        self._entries: list[_Entry] = []
        self._blocks: list[tuple[int, int]] = []
        self._open: dict[int, int] = {}
        suffixes: Counter[str] = Counter()
        for number, path in enumerate(self._paths):
            start = len(self._entries)
            self._entries += self._shard_entries(number, _index(path), suffixes)
            if limit is not None:
                del self._entries[limit:]
            if len(self._entries) > start:
                self._blocks.append((start, len(self._entries)))
            if limit is not None and len(self._entries) >= limit:
                break
        if all(entry.reason for entry in self._entries):
            self._refuse(suffixes)

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def blocks(self) -> Sequence[tuple[int, int]]:
        return self._blocks

    def __getitem__(self, index: int) -> Sample:
        return self._read(index, with_image=True)

    def captions_of(self, index: int) -> Sample:
        return self._read(index, with_image=False)

    def image_stamp(self, index: int) -> str:
        """What changes with the image, as far as that shows without reading it: member, place, the shard's state."""
        entry = self._entries[index]
        shard = self._paths[entry.shard]
        return f"{self._labels[entry.shard]}/{entry.stem} {entry.image} {file_state(shard)}"

    def __getstate__(self) -> dict[str, Any]:
        # descriptors mean nothing in another process
        return self.__dict__ | {"_open": {}}

    def __del__(self) -> None:
        for descriptor in self.__dict__.get("_open", {}).values():
            os.close(descriptor)

    def _read(self, index: int, with_image: bool) -> Sample:
        entry = self._entries[index]
        key = f"{self._labels[entry.shard]}/{entry.stem}"
        if entry.reason:
            raise BadSampleError(key, entry.reason)
        record: dict[str, Any] = {}
        if entry.record is not None:
            record = parse_json_record(key, self._bytes(key, entry.shard, *entry.record))
        for field, offset, size in entry.texts:
            text = _utf8(key, self._bytes(key, entry.shard, offset, size))
            # the same name in the JSON wins; a text file that says something else is a caption of its own
            if record.get(field) != text:
                record[field if field not in record else f"{field}.txt"] = text
        image = (
            self._bytes(key, entry.shard, *entry.image) if with_image and entry.image is not None else None
        )
        sample = sample_from_record(key, record, image)
        if not sample.captions:
            raise BadSampleError(key, "it has no caption with text")
        return sample

    def _bytes(self, key: str, shard: int, offset: int, size: int) -> bytes:
        try:
            data = os.pread(self._descriptor(shard), size, offset)
        except OSError as error:
            raise BadSampleError(key, f"{self._paths[shard]} cannot be read ({error.strerror})") from None
        if len(data) < size:
            raise BadSampleError(key, f"{self._paths[shard]} became shorter while it was in use")
        return data

    def _descriptor(self, shard: int) -> int:
        descriptor = self._open.get(shard)
        if descriptor is None:
            while len(self._open) >= MAX_OPEN_SHARDS:
                os.close(self._open.pop(next(iter(self._open))))
            descriptor = self._open[shard] = os.open(self._paths[shard], os.O_RDONLY | os.O_CLOEXEC)
        return descriptor

    def _shard_entries(self, shard: int, index: TarIndex, suffixes: Counter[str]) -> list[_Entry]:
        entries: dict[str, _Entry] = {}
        for name, offset, size in zip(index.names, index.offsets, index.sizes, strict=True):
            base = name.rpartition("/")[2]
            # "._x" files are what macOS puts beside x
            if base.startswith("._"):
                continue
            stem, _, suffix = base.partition(".")
            suffix = suffix.lower()
            suffixes[suffix] += 1
            if suffix not in IMAGE_SUFFIXES and suffix != "json" and suffix.rpartition(".")[2] != "txt":
                continue
            stem = (name.removesuffix(base) + stem).removeprefix("./")
            entry = entries.setdefault(stem, _Entry(shard, stem))
            if name.startswith("/") or ".." in name.split("/"):
                entry.reason = f"its member {name!r} names a place outside the shard"
            elif size > self._max_member_bytes:
                entry.reason = (
                    f"its member {name!r} has {size} bytes, more than the {self._max_member_bytes} allowed"
                )
            elif suffix in IMAGE_SUFFIXES:
                entry.image = entry.image or (offset, size)
            elif suffix == "json":
                entry.record = entry.record or (offset, size)
            else:
                entry.texts += ((suffix.removesuffix("txt").rstrip(".") or "caption", offset, size),)
        for entry in entries.values():
            if not entry.reason and entry.record is None and not entry.texts:
                entry.reason = "it has an image but no json or txt member with captions"
        bad = [
            _Entry(shard, name, reason=f"it is {what}, which is never followed")
            for name, what in index.refused
        ]
        if index.damage:
            bad.append(_Entry(shard, "(rest of the shard)", reason=f"{self._paths[shard]} is {index.damage}"))
        return [*entries.values(), *bad]

    def _refuse(self, suffixes: Counter[str]) -> None:
        reasons = [f"{self._labels[entry.shard]}/{entry.stem}: {entry.reason}" for entry in self._entries[:3]]
        found = ", ".join(f"{count} .{suffix}" for suffix, count in suffixes.most_common(8)) or "no members"
        raise DataError(
            f"{self.name} has no sample that can be used: expected members {'|'.join(IMAGE_SUFFIXES)} with "
            f"json or txt of the same name in {len(self._paths)} shard(s), found {found}"
            + (f" ({'; '.join(reasons)})" if reasons else "")
        )


def _index(path: str) -> TarIndex:
    try:
        return index_tar(path)
    except OSError as error:
        raise DataError(f"the shard {path} cannot be read: {error.strerror}") from error


def _utf8(key: str, data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadSampleError(key, f"its text is not UTF-8 ({error})") from None


def _labels(paths: Sequence[str]) -> list[str]:
    """Short names of the shards: as many trailing parts of the path as it takes to tell them apart."""
    for parts in range(1, 8):
        labels = ["/".join(Path(path).with_suffix("").parts[-parts:]) for path in paths]
        if len(set(labels)) == len(labels):
            return labels
    return list(paths)
