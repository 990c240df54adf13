"""Labelled images: a folder per class (ImageNet's layout), tar shards with `.cls` members, or a .csv."""

from __future__ import annotations

import csv
import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from llm2clip.data.shards import index_tar
from llm2clip.data.sources import expand_path
from llm2clip.data.tabular import IMAGE_COLUMNS
from llm2clip.errors import BadSampleError, DataError
from llm2clip.evaluation.datasets.base import ImageFiles, ImageReader, SomeImages

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm")
LABEL_COLUMNS = ("label", "class", "cls", "target", "category", "y")


@dataclass(frozen=True)
class LabelledImages:
    """Images with one class each.

    Attributes:
        images: the images.
        labels: (N,) int64, index into `folders`.
        folders: what the images call their classes: folder names, words of a column, or numbers.
        numbered: the classes are numbers, so that a list of names goes by them.
    """

    images: ImageReader
    labels: npt.NDArray[np.int64]
    folders: list[str]
    numbered: bool = False


def open_labelled(path: str) -> LabelledImages:
    """Open labelled images of any of the three layouts.

    Args:
        path: directory with a folder per class; directory, brace range or glob of .tar shards; or a .csv.

    Raises:
        DataError: nothing there can be read; says what was found.
    """
    if not path:
        raise DataError(
            "no labelled images given; expected a directory with a folder per class, .tar or .csv"
        )
    found = expand_path(path)
    if len(found) == 1 and found[0].is_dir():
        shards = sorted(found[0].glob("*.tar"))
        return _open_tars(shards, path) if shards else _open_folders(found[0])
    suffixes = {file.suffix.lower() for file in found}
    if suffixes == {".tar"}:
        return _open_tars(found, path)
    if suffixes == {".csv"} and len(found) == 1:
        return _open_csv(found[0])
    raise DataError(
        f"{path}: expected a directory with a folder per class, .tar shards or one .csv, got "
        f"{', '.join(sorted(suffixes)) or 'nothing'}"
    )


def _open_folders(root: Path) -> LabelledImages:
    folders = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
    names: list[str] = []
    labels: list[int] = []
    kept: list[str] = []
    for folder in folders:
        own = []
        for base, _, files in os.walk(root / folder):
            inside = Path(base).relative_to(root)
            own += [f"{inside}/{file}" for file in files if file.lower().endswith(IMAGE_SUFFIXES)]
        if own:
            labels += [len(kept)] * len(own)
            names += sorted(own)
            kept.append(folder)
    if len(kept) < 2:
        raise DataError(
            f"{root}: expected a folder of images for each class, found {len(folders)} folders of which {len(kept)} "
            f"hold images ({'/'.join(suffix[1:] for suffix in IMAGE_SUFFIXES[:4])}, ...)"
        )
    return LabelledImages(ImageFiles(root, names), np.array(labels, np.int64), kept)


class TarImages:
    """Images inside tar shards, read where they lie.

    Args:
        shards: the files.
        places: (shard, offset, size) of every image.
        keys: its name.
    """

    def __init__(
        self, shards: Sequence[Path], places: Sequence[tuple[int, int, int]], keys: Sequence[str]
    ) -> None:
        self._shards, self._places, self._keys = list(shards), list(places), list(keys)

    def __len__(self) -> int:
        return len(self._keys)

    def key(self, row: int) -> str:
        return self._keys[row]

    def read(self, row: int) -> bytes:
        shard, offset, size = self._places[row]
        try:
            return _read(self._shards[shard], offset, size)
        except OSError as error:
            raise BadSampleError(
                self._keys[row], f"{self._shards[shard]} cannot be read ({error.strerror})"
            ) from None

    def identity(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for key, (_, offset, size) in zip(self._keys, self._places, strict=True):
            digest.update(f"{key}\0{offset}\0{size}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def missing(self) -> list[str]:
        return []


def _read(path: Path, offset: int, size: int) -> bytes:
    with open(path, "rb") as handle:
        handle.seek(offset)
        return handle.read(size)


def _open_tars(shards: Sequence[Path], path: str) -> LabelledImages:
    places: list[tuple[int, int, int]] = []
    keys: list[str] = []
    written: list[str] = []
    suffixes: Counter[str] = Counter()
    for number, shard in enumerate(shards):
        try:
            index = index_tar(shard)
        except OSError as error:
            raise DataError(f"the shard {shard} cannot be read: {error.strerror}") from error
        if index.damage:
            raise DataError(f"the shard {shard} is {index.damage}; a benchmark needs all of it")
        images: dict[str, tuple[int, int]] = {}
        for name, offset, size in zip(index.names, index.offsets, index.sizes, strict=True):
            stem, _, suffix = name.rpartition("/")[2].partition(".")
            stem = name[: len(name) - len(suffix) - 1] if suffix else stem
            suffixes[suffix.lower()] += 1
            if f".{suffix.lower()}" in IMAGE_SUFFIXES:
                images[stem] = (offset, size)
        for name, offset, size in zip(index.names, index.offsets, index.sizes, strict=True):
            if name.endswith(".cls") and (place := images.get(name[: -len(".cls")])):
                places.append((number, *place))
                keys.append(f"{shard.stem}/{name[: -len('.cls')]}")
                written.append(_read(shard, offset, size).decode("utf-8", "replace").strip())
    if not places:
        counts = ", ".join(f"{count} .{suffix}" for suffix, count in suffixes.most_common(6)) or "no members"
        raise DataError(
            f"{path}: expected members <name>.jpg with <name>.cls, the number or name of the class; found {counts}"
        )
    return _labelled(TarImages(shards, places, keys), written)


def _open_csv(path: Path) -> LabelledImages:
    try:
        with open(path, newline="", encoding="utf-8-sig") as handle:
            reader = csv.DictReader(handle)
            columns = list(reader.fieldnames or [])
            image = next((name for name in IMAGE_COLUMNS if name in columns), None)
            label = next((name for name in LABEL_COLUMNS if name in columns), None)
            if image is None or label is None:
                raise DataError(
                    f"{path}: expected a column of image paths ({', '.join(IMAGE_COLUMNS[:5])}, ...) and one of labels "
                    f"({', '.join(LABEL_COLUMNS)}); columns found: {', '.join(columns) or 'none'}"
                )
            rows = [(row[image] or "", (row[label] or "").strip()) for row in reader]
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is not a CSV file in UTF-8 ({error})") from error
    if lost := [number for number, (name, word) in enumerate(rows, 2) if not name or not word]:
        raise DataError(f"{path}: no image or no label in {len(lost)} rows, the first in line {lost[0]}")
    if not rows:
        raise DataError(f"{path} has no rows")
    return _labelled(ImageFiles(path.parent, [name for name, _ in rows]), [word for _, word in rows])


def _labelled(images: ImageReader, written: Sequence[str]) -> LabelledImages:
    """Classes by number where all are numbers, else by name in alphabetical order."""
    if all(word.isdigit() for word in written):
        labels = np.array([int(word) for word in written], np.int64)
        return LabelledImages(images, labels, [str(n) for n in range(int(labels.max()) + 1)], numbered=True)
    folders = sorted(set(written))
    place = {folder: number for number, folder in enumerate(folders)}
    return LabelledImages(images, np.array([place[word] for word in written], np.int64), folders)


def first_images(data: LabelledImages, limit: int | None) -> LabelledImages:
    """The first `limit` images; None: all. Evenly over the whole, since folders follow each other by class."""
    if limit is None or limit >= len(data.images):
        return data
    rows = np.unique(np.linspace(0, len(data.images) - 1, limit).astype(np.int64))
    return LabelledImages(
        SomeImages(data.images, rows.tolist()), data.labels[rows], data.folders, data.numbered
    )
