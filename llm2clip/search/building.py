"""Images and captions through the model, for the index."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from llm2clip.errors import BadSampleError, DataError
from llm2clip.evaluation.encoders.base import DualEncoder
from llm2clip.search.collection import Captions, Collection
from llm2clip.search.index import Compute

_BAD_SHARE_FROM = 50  # images to see before the share of bad ones means anything
_AHEAD = 4  # images read ahead of each thread
_NAMED = 20
_TEXTS = 256  # captions at a time


def image_features(
    encoder: DualEncoder, collection: Collection, *, batch_size: int, max_bad_share: float, threads: int
) -> Compute:
    """What computes features of images; images that cannot be read are named and left out.

    Args:
        encoder: the model.
        collection: the images.
        batch_size: images per forward pass.
        max_bad_share: stop with DataError when more cannot be read.
        threads: that read and decode, while the model computes.
    """
    # a JPEG is decoded at the smallest size that the model's input does not exceed
    min_side = int(getattr(encoder.transform, "min_side", 0))

    def read(number: int) -> tuple[int, Any, str]:
        try:
            return number, encoder.transform(collection.image(number, min_side=min_side)), ""
        except BadSampleError as problem:
            return number, None, str(problem)

    def compute(numbers: Sequence[int]) -> Iterator[tuple[Sequence[int], Tensor]]:
        bad: list[str] = []
        kept: list[tuple[int, Any]] = []
        with ThreadPoolExecutor(threads, "read") as pool:
            for seen, (number, pixels, problem) in enumerate(
                _ahead(pool, read, numbers, threads * _AHEAD), 1
            ):
                if problem:
                    bad.append(problem)
                    _report(bad, seen, max_bad_share, collection.name)
                else:
                    kept.append((number, pixels))
                if len(kept) == batch_size or (seen == len(numbers) and kept):
                    yield [number for number, _ in kept], encoder.encode_images([one for _, one in kept])
                    kept = []
        if bad:
            print(f"{len(bad)} images of {collection.name} cannot be used and are left out", file=sys.stderr)

    return compute


def _report(bad: Sequence[str], seen: int, max_bad_share: float, name: str) -> None:
    if len(bad) <= _NAMED:
        print(f"left out {bad[-1]}", file=sys.stderr)
    if seen >= _BAD_SHARE_FROM and len(bad) > max_bad_share * seen:
        raise DataError(
            f"{len(bad)} of the first {seen} images of {name} cannot be used, more than max_bad_share = "
            f"{max_bad_share}. The first:\n  " + "\n  ".join(bad[:10])
        )


def _ahead(pool: ThreadPoolExecutor, read: Any, numbers: Sequence[int], count: int) -> Iterator[Any]:
    """`read` of every number in order, up to `count` of them in work at a time."""
    pending: deque[Future[Any]] = deque()
    try:
        for number in numbers:
            pending.append(pool.submit(read, number))
            if len(pending) >= count:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:  # after an error nobody waits for the rest
        for future in pending:
            future.cancel()


def caption_features(encoder: DualEncoder, captions: Captions) -> Compute:
    """What computes features of captions."""

    def compute(numbers: Sequence[int]) -> Iterator[tuple[Sequence[int], Tensor]]:
        for start in range(0, len(numbers), _TEXTS):
            part = numbers[start : start + _TEXTS]
            yield part, encoder.encode_texts([captions.texts[number] for number in part])

    return compute


def feature_width(encoder: DualEncoder) -> int:
    """Dimension of the space in which images and captions meet, from one grey image."""
    from PIL import Image

    with torch.no_grad():
        return encoder.encode_images([encoder.transform(Image.new("RGB", (64, 64), "grey"))]).shape[1]
