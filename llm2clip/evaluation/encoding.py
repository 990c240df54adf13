"""Images and captions of a data set through a model, into the cache."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from llm2clip.data.images import decode_image
from llm2clip.data.workers import batches_of
from llm2clip.errors import BadSampleError, DataError
from llm2clip.evaluation.datasets.base import ImageReader
from llm2clip.evaluation.encoders.base import DualEncoder
from llm2clip.evaluation.encoders.captions import digest_of_texts
from llm2clip.evaluation.features import FeatureCache, Features, gather_lists
from llm2clip.progress import Progress
from llm2clip.settings import BenchmarkSettings, Layer

_LOOKS = 16  # images whose content tells whether a file was replaced under its name
_BLANK = (8, 8)


class _Pixels(Dataset[tuple[Any, str]]):
    """Transformed images; one that cannot be decoded is blank, with the reason beside it."""

    def __init__(
        self, images: ImageReader, rows: Sequence[int], transform: Callable[[Image.Image], Any]
    ) -> None:
        self._images, self._rows, self._transform = images, rows, transform

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[Any, str]:
        row = self._rows[index]
        try:
            image = decode_image(self._images.read(row), key=self._images.key(row))
            return self._transform(image), ""
        except BadSampleError as problem:
            return self._transform(Image.new("RGB", _BLANK)), str(problem)


def _together(samples: list[tuple[Any, str]]) -> tuple[list[Any], list[str]]:
    return [pixels for pixels, _ in samples], [reason for _, reason in samples]


def encode_images(
    encoder: DualEncoder,
    images: ImageReader,
    cache: FeatureCache,
    settings: BenchmarkSettings,
    *,
    what: str,
    layer: Layer = "projected",
) -> tuple[Features, list[str]]:
    """Features of every image; rows of NaN where an image cannot be used.

    Args:
        encoder: the model.
        images: the images.
        cache: where features are kept.
        settings: batch size, workers, and how many images may be bad.
        what: name of the data set, for progress and messages.
        layer: which features.

    Returns:
        The features, and why images cannot be used (the first hundred).

    Raises:
        DataError: more than `settings.max_bad_share` of the images cannot be used.
    """
    identity = {
        "images": images.identity(),
        "content": _content_digest(images),
        "layer": layer,
        **encoder.image_identity(),
    }
    reasons: list[str] = []

    def produce(rows: Sequence[int]) -> Iterator[Tensor]:
        loader = DataLoader(
            _Pixels(images, rows, encoder.transform),
            batch_size=settings.batch_size,
            num_workers=settings.workers,
            collate_fn=_together,
        )
        title = f"{encoder.label}, {what}: images"
        with Progress(len(rows), title, "images", enabled=cache.world.is_main) as shown:
            for pixels, problems in batches_of(loader):
                features = encoder.encode_images(pixels, layer).cpu()
                bad = [number for number, problem in enumerate(problems) if problem]
                features[bad] = torch.nan
                reasons.extend(problem for problem in problems if problem)
                yield features
                shown.update(len(problems))

    features = cache.array("images", identity, len(images), produce)
    found = gather_lists(cache.world, reasons)
    lost = int((~features.valid()).sum())
    refuse_bad(found, lost, len(images), settings.max_bad_share, what)
    if cache.world.is_main:
        for reason in found[:10]:
            print(f"skipped {reason}", file=sys.stderr)
    return features, found[:100]


def refuse_bad(reasons: Sequence[str], lost: int, total: int, share: float, what: str) -> None:
    """Stop where too many images are missing or damaged.

    Raises:
        DataError: more than `share` are; shows the first ten.
    """
    if lost > share * total or total - lost < 2:
        raise DataError(
            f"{lost} of the {total} images of {what} cannot be used; figures without them would not be the "
            f"benchmark's (allowed by max_bad_share: {share}). The first:\n  " + "\n  ".join(reasons[:10])
        )


def check_images(images: ImageReader, settings: BenchmarkSettings, what: str) -> None:
    """Refuse a data set whose image files are missing, before anything is computed.

    Raises:
        DataError: more than `settings.max_bad_share` are missing; names the first ten.
    """
    missing = images.missing()
    refuse_bad(
        [f"{name} does not exist" for name in missing],
        len(missing),
        len(images),
        settings.max_bad_share,
        what,
    )


def encode_texts(encoder: DualEncoder, texts: Sequence[str], cache: FeatureCache, *, what: str) -> Features:
    """Features of every caption.

    Raises:
        StoreError: captions are in no store, and there is no LLM.
    """
    identity = {"texts": digest_of_texts(texts), **encoder.text_identity()}

    def produce(rows: Sequence[int]) -> Iterator[Tensor]:
        title = f"{encoder.label}, {what}: captions"
        with Progress(len(rows), title, "captions", enabled=cache.world.is_main) as shown:
            # a block at a time: what the encoder keeps of a block is found again after a stop
            for start in range(0, len(rows), cache.block_rows):
                part = rows[start : start + cache.block_rows]
                yield encoder.encode_texts([texts[row] for row in part])
                shown.update(len(part))

    return cache.array("texts", identity, len(texts), produce)


def _content_digest(images: ImageReader) -> str:
    """Hash of a few images: a data set that was made anew under the same names is another one."""
    digest = hashlib.blake2b(digest_size=16)
    rows: npt.NDArray[np.int64] = np.unique(np.linspace(0, len(images) - 1, _LOOKS).astype(np.int64))
    for row in rows.tolist():
        try:
            digest.update(images.read(row))
        except BadSampleError:
            digest.update(b"-")
    return digest.hexdigest()
