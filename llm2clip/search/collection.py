"""What is searched: images wherever they lie, the captions that came with them, further texts."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from llm2clip.data.image_folder import ImageFolder, image_names
from llm2clip.data.images import decode_image
from llm2clip.data.mixture import Mixture
from llm2clip.data.sample import Sample
from llm2clip.data.sources import CAPTION_FILES, Source, expand_path, open_source, stamp_of
from llm2clip.data.store_lookup import Digests, digest_array
from llm2clip.errors import BadSampleError, ConfigError
from llm2clip.progress import Progress

_SHOWN_BAD = 10
_QUIET = 20_000  # fewer samples are read before anyone wonders what happens


class Collection:
    """Images by their number; may be read by several threads.

    Args:
        source: where they are.
    """

    def __init__(self, source: Source) -> None:
        self.name = source.name
        self._source = source
        self._lock = threading.Lock()  # sources keep open files, which threads must not share

    def __len__(self) -> int:
        return len(self._source)

    def addresses(self) -> Digests:
        """Address of every image in an index, (len, 2): another one once the image changes."""
        with Progress(len(self), "listing", "images", enabled=len(self) > _QUIET) as shown:
            return digest_array([f"search {self._stamp(number)}" for number in shown.track(range(len(self)))])

    def _stamp(self, number: int) -> str:
        try:
            return stamp_of(self._source, number)
        except BadSampleError as problem:  # named when the image itself is read
            return f"unreadable {problem.key}"

    def image(self, number: int, *, min_side: int = 0) -> Image.Image:
        """Decoded RGB image, see `decode_image`.

        Raises:
            BadSampleError: there is none, or it cannot be decoded.
        """
        with self._lock:
            sample = self._source[number]
        if sample.image is None:
            raise BadSampleError(sample.key, "it has no image")
        return decode_image(sample.image, key=sample.key, min_side=min_side)

    def describe(self, number: int) -> Sample:
        """Key, captions and what else is known of an image, without reading it.

        Raises:
            BadSampleError: its record cannot be read.
        """
        with self._lock:
            return self._source.captions_of(number)


def open_collection(paths: Sequence[str]) -> Collection:
    """The images of folders and sources, one after the other.

    A directory with a captions file, or with shards, is a source (training and held-out shards together); any other
    is searched for images with all that is below it.

    Raises:
        ConfigError: no path is given.
        DataError: a path does not exist, or there is no image.
    """
    if not paths:
        raise ConfigError(
            "images is empty; name a folder of images or shards, for example --images ~/photos (docs/search.md)"
        )
    sources = [_open(path) for path in paths]
    return Collection(sources[0] if len(sources) == 1 else Mixture(sources))


def _open(path: str) -> Source:
    found = expand_path(path)
    if len(found) == 1 and found[0].is_dir() and not _holds_source(found[0]) and image_names(found[0]):
        return ImageFolder(found[0])
    return open_source(path, mixed_splits=True)


def _holds_source(folder: Path) -> bool:
    if any((folder / name).is_file() for name in CAPTION_FILES):
        return True
    return any(entry.suffix in (".tar", ".parquet") and entry.is_file() for entry in folder.iterdir())


class Captions:
    """Different texts and the image that each came with.

    Attributes:
        texts: the texts.
        image: number of the first image with the text, -1 where it came with none: (len(texts),) int64.
    """

    def __init__(self, texts: list[str], image: Sequence[int]) -> None:
        self.texts = texts
        self.image: npt.NDArray[np.int64] = np.asarray(image, np.int64)

    def __len__(self) -> int:
        return len(self.texts)

    def addresses(self) -> Digests:
        """Address of every text in an index, (len, 2)."""
        return digest_array(self.texts)


def captions_of(collection: Collection, fields: Sequence[str], limit: int) -> Captions:
    """The different captions that came with the images, first come."""
    return _gather(collection, fields, limit, own=True)


def open_captions(paths: Sequence[str], fields: Sequence[str], limit: int) -> Captions:
    """The different texts of other sources, first come.

    Raises:
        DataError: a path does not exist or has no text.
    """
    return _gather(Collection(open_source(paths, mixed_splits=True)), fields, limit, own=False)


def _gather(collection: Collection, fields: Sequence[str], limit: int, *, own: bool) -> Captions:
    texts: dict[str, int] = {}
    bad: list[str] = []
    with Progress(len(collection), "reading captions", "samples", enabled=len(collection) > _QUIET) as shown:
        for number in shown.track(range(len(collection))):
            if len(texts) >= limit:
                break
            try:
                for text in _texts(collection.describe(number), fields):
                    texts.setdefault(text, number if own else -1)
            except BadSampleError as problem:
                bad.append(str(problem))
    for reason in bad[:_SHOWN_BAD]:
        print(f"no caption of {reason}", file=sys.stderr)
    kept = list(texts.items())[:limit]
    return Captions([text for text, _ in kept], [number for _, number in kept])


def _texts(sample: Sample, fields: Sequence[str]) -> Iterator[str]:
    for name, texts in sample.captions.items():
        if not fields or name in fields:
            yield from texts


def main_texts(sample: Sample) -> list[str]:
    """The captions in the data's own language: those whose field has no dot (`es.caption`), where there are any."""
    plain = [text for name, texts in sample.captions.items() if "." not in name for text in texts]
    return plain or [text for texts in sample.captions.values() for text in texts]
