"""What a retrieval data set is to the evaluation: images, and captions that each belong to one of them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from llm2clip.data.sources import MAX_MEMBER_BYTES
from llm2clip.errors import BadSampleError, DataError


class ImageReader(Protocol):
    """Encoded images by row number; the bytes stay on disk."""

    def __len__(self) -> int:
        """Number of images."""

    def key(self, row: int) -> str:
        """Name of an image, for messages and the report."""

    def read(self, row: int) -> bytes:
        """The encoded image; raises BadSampleError when there is none."""

    def identity(self) -> str:
        """Digest that changes when the images do, as far as that shows without reading them."""

    def missing(self) -> list[str]:
        """Names of the images that are not there, as far as that shows without reading them."""


class ImageFiles:
    """Images as files of one folder.

    Args:
        folder: where the names start.
        names: path of every image below `folder`.
    """

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.folder, self._names = folder, list(names)
        self._sizes: list[int] | None = None

    def __len__(self) -> int:
        return len(self._names)

    def key(self, row: int) -> str:
        return self._names[row]

    def read(self, row: int) -> bytes:
        path = self.folder / self._names[row]
        try:
            if path.stat().st_size > MAX_MEMBER_BYTES:
                raise BadSampleError(
                    self._names[row], f"its image has more than the {MAX_MEMBER_BYTES} bytes allowed"
                )
            return path.read_bytes()
        except OSError as error:
            raise BadSampleError(
                self._names[row], f"its image {path} cannot be read ({error.strerror})"
            ) from None

    def identity(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for name, size in zip(self._names, self._stat(), strict=True):
            digest.update(f"{name}\0{size}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def missing(self) -> list[str]:
        return [name for name, size in zip(self._names, self._stat(), strict=True) if size < 0]

    def _stat(self) -> list[int]:
        """Size of every file, -1 where there is none."""
        if self._sizes is None:
            self._sizes = []
            for name in self._names:
                try:
                    self._sizes.append((self.folder / name).stat().st_size)
                except OSError:
                    self._sizes.append(-1)
        return self._sizes


@dataclass(frozen=True)
class CaptionSet:
    """Captions of one kind (a language, short or long) and the image that each belongs to.

    Attributes:
        kind: name of the kind, shown in the tables.
        texts: the captions.
        image: (len(texts),) int64, row of each caption's image.
    """

    kind: str
    texts: list[str]
    image: npt.NDArray[np.int64]


@dataclass(frozen=True)
class RetrievalData:
    """A data set to retrieve from.

    Attributes:
        name: as in the settings.
        title: as in papers.
        images: the images.
        captions: one set per kind.
        equal_match: captions with equal text are each other's right answers. False is the protocol of the
            published benchmarks, where only an image's own captions count.
        meta: licence and attribution, for the report.
    """

    name: str
    title: str
    images: ImageReader
    captions: list[CaptionSet]
    equal_match: bool = False
    meta: dict[str, list[str]] = field(default_factory=dict)

    def head(self, limit: int | None) -> RetrievalData:
        """The first `limit` images with their captions; None: all."""
        if limit is None or limit >= len(self.images):
            return self
        kept = []
        for captions in self.captions:
            rows = np.flatnonzero(captions.image < limit)
            if len(rows):
                texts = [captions.texts[row] for row in rows.tolist()]
                kept.append(CaptionSet(captions.kind, texts, captions.image[rows]))
        return replace(self, images=SomeImages(self.images, range(limit)), captions=kept)


class SomeImages:
    """Some of the images of a reader, in the order of `rows`."""

    def __init__(self, images: ImageReader, rows: Sequence[int]) -> None:
        self._images, self._rows = images, rows

    def __len__(self) -> int:
        return len(self._rows)

    def key(self, row: int) -> str:
        return self._images.key(self._rows[row])

    def read(self, row: int) -> bytes:
        return self._images.read(self._rows[row])

    def identity(self) -> str:
        rows = np.asarray(self._rows, np.int64).tobytes()
        return f"{self._images.identity()}:{hashlib.blake2b(rows, digest_size=16).hexdigest()}"

    def missing(self) -> list[str]:
        own = {self.key(row) for row in range(len(self._rows))}
        return [name for name in self._images.missing() if name in own]


@dataclass(frozen=True)
class Request:
    """What a reader is asked for.

    Attributes:
        root: directory of the data set.
        images: directory of the images where they are not below `root`.
        split: name of the split; "" for the one that papers report.
        per_image: at most so many captions of an image, first come; None: as papers do.
    """

    root: Path
    images: Path | None = None
    split: str = ""
    per_image: int | None = None


def caption_set(kind: str, captions: Sequence[Sequence[str]], per_image: int | None = None) -> CaptionSet:
    """The captions of every image, image by image; empty texts are dropped."""
    texts: list[str] = []
    owner: list[int] = []
    for row, own in enumerate(captions):
        kept = [text for text in (text.strip() for text in own) if text][:per_image]
        texts += kept
        owner += [row] * len(kept)
    return CaptionSet(kind, texts, np.array(owner, np.int64))


def find_file(root: Path, *names: str) -> Path:
    """The first of `names` that exists in `root`.

    Raises:
        DataError: none does; says what was looked for and what is there.
    """
    for name in names:
        if (root / name).is_file():
            return root / name
    raise DataError(f"{root} lacks {' or '.join(names)}; {_found(root)}")


def find_images(request: Request, folders: Sequence[str], names: Sequence[str]) -> ImageFiles:
    """The images `names`, in the first of `folders` that has any of them.

    A few names are tried in each folder; `request.images` stands for the folders where it is given.

    Raises:
        DataError: no folder has any of the images tried.
    """
    tried = names[:: max(1, len(names) // 16)]
    base = request.images if request.images is not None else request.root
    for folder in ("", *folders):
        if any((base / folder / name).is_file() for name in tried):
            return ImageFiles(base / folder, names)
    places = ", ".join(str(base / folder) for folder in ("", *folders))
    raise DataError(
        f"none of the images was found, for example {names[0]}; looked in {places}. {_found(base)} "
        "Name the directory of the images with images.<data set>."
    )


def require_split(split: str, found: Sequence[str], what: object) -> None:
    """Refuse a split that the data set does not have.

    Raises:
        DataError: lists the splits found.
    """
    if split not in found:
        listing = ", ".join(sorted(set(found))) or "none"
        raise DataError(f"{what} has no split {split!r}; splits found: {listing}")


def field_of(record: Any, name: str, kind: type | tuple[type, ...], where: object) -> Any:
    """`record[name]`, of the type expected.

    Raises:
        DataError: the field is not there (lists those found) or has another type.
    """
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected an object with {name!r}, got a {type(record).__name__}")
    if name not in record:
        raise DataError(
            f"{where} has no field {name!r}; fields found: {', '.join(map(str, record)) or 'none'}"
        )
    if not isinstance(record[name], kind):
        names = "/".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise DataError(f"{where}: {name!r} must be {names}, got a {type(record[name]).__name__}")
    return record[name]


def _found(root: Path) -> str:
    if not root.is_dir():
        return f"{root} is no directory."
    present = sorted(entry.name + ("/" if entry.is_dir() else "") for entry in root.iterdir())
    shown = ", ".join(present[:8]) + (f" and {len(present) - 8} more" if len(present) > 8 else "")
    return f"it holds {shown or 'nothing'}."
