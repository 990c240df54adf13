"""Queries to answers: what the page shows, without the page."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from PIL import Image
from torch import Tensor

from llm2clip.data.sample import Sample
from llm2clip.errors import BadSampleError
from llm2clip.evaluation.samples import thumbnail
from llm2clip.search.batching import Batcher
from llm2clip.search.collection import Captions, Collection
from llm2clip.search.index import FeatureIndex, Found
from llm2clip.search.model import SearchModel
from llm2clip_kernels.similarity_topk.op import MAX_K

THUMBNAIL_SIDE, PICTURE_SIDE = 320, 1600
_THUMBNAIL_BYTES = 64 << 20
_KNOWN_TEXTS = 1024  # features of the last texts are kept: the page asks for them again
_CAPTIONS = 12  # captions shown for an image


class ImageSearch(Protocol):
    """Exact or approximate search over image features."""

    def __len__(self) -> int: ...

    def feature_of(self, item: int) -> Tensor | None: ...

    def search(self, queries: Tensor, k: int) -> Found: ...


@dataclass(frozen=True)
class Query:
    """What is looked for: a text, the model's input for an image, or an image of the collection by its number.

    Attributes:
        kind: which of them `value` is.
        value: the query.
        count: how many images are wanted, 1 to 64.
    """

    kind: Literal["text", "pixels", "item"]
    value: Any
    count: int


@dataclass(frozen=True)
class Answer:
    """The best images, and for an image the best captions, with their cosine similarities; seconds it took."""

    images: list[tuple[int, float]]
    captions: list[tuple[int, float]]
    encode_seconds: float
    compare_seconds: float


class SearchService:
    """Answers queries of many clients with one model.

    Args:
        model: the model.
        collection: the images.
        images: their features.
        captions: texts that an image finds, if any.
        caption_index: their features.
        waiting: searches that may wait.
    """

    def __init__(
        self,
        model: SearchModel,
        collection: Collection,
        images: ImageSearch,
        captions: Captions,
        caption_index: FeatureIndex | None,
        *,
        waiting: int = 256,
    ) -> None:
        self.model, self.collection, self.images, self.captions = model, collection, images, captions
        self._caption_index = caption_index
        self._known: OrderedDict[str, Tensor] = OrderedDict()
        self._batcher: Batcher[Query, Answer] = Batcher(self._answer, waiting=waiting)
        self._thumbnails = _Cache(_THUMBNAIL_BYTES)

    def close(self) -> None:
        """Answer what waits, then stop."""
        self._batcher.close()

    def submit(self, query: Query) -> Future[Answer]:
        """Look for something; raises BusyError when too many wait."""
        return self._batcher.submit(query)

    def pixels(self, image: Image.Image) -> Any:
        """The model's input for a decoded image."""
        return self.model.encoder.transform(image)

    def holds(self, item: int) -> bool:
        """Whether there is an image of this number that can be found."""
        return 0 <= item < len(self.collection) and self.images.feature_of(item) is not None

    def describe(self, item: int) -> Sample:
        """Key, captions and what else is known of an image; without captions where its record cannot be read."""
        try:
            return self.collection.describe(item)
        except BadSampleError as problem:
            return Sample(problem.key, {})

    def thumbnail(self, item: int) -> bytes:
        """A small encoded image; raises BadSampleError when it cannot be decoded."""
        return self._thumbnails.get(item, self._make_thumbnail)

    def picture(self, item: int) -> bytes:
        """The image at up to 1600 pixels, encoded anew: nothing of the file but its pixels leaves the machine."""
        return thumbnail(self.collection.image(item, min_side=PICTURE_SIDE), PICTURE_SIDE, enlarge=False)

    def _make_thumbnail(self, item: int) -> bytes:
        return thumbnail(self.collection.image(item, min_side=THUMBNAIL_SIDE), THUMBNAIL_SIDE)

    @torch.inference_mode()
    def _answer(self, queries: Sequence[Query]) -> list[Answer]:
        begin = time.perf_counter()
        features = self._features(queries)
        encoded = time.perf_counter()
        count = min(MAX_K, max(query.count for query in queries))
        images = self.images.search(features, count)
        captions: list[list[tuple[int, float]]] = [[] for _ in queries]
        pictures = [row for row, query in enumerate(queries) if query.kind != "text"]
        if self._caption_index is not None and pictures:
            found = self._caption_index.search(features[pictures], _CAPTIONS)
            for place, row in enumerate(pictures):
                captions[row] = _pairs(found, place, _CAPTIONS)
        compared = time.perf_counter()
        return [
            Answer(_pairs(images, row, query.count), captions[row], encoded - begin, compared - encoded)
            for row, query in enumerate(queries)
        ]

    def _features(self, queries: Sequence[Query]) -> Tensor:
        """(queries, D) fp32 on the CPU; each kind in one forward pass."""
        made: dict[int, Tensor] = {}
        rows = [row for row, query in enumerate(queries) if query.kind == "pixels"]
        if rows:
            values = self.model.encoder.encode_images([queries[row].value for row in rows]).cpu()
            made |= dict(zip(rows, values, strict=True))
        texts = {row: str(query.value) for row, query in enumerate(queries) if query.kind == "text"}
        known = self._text_features(list(dict.fromkeys(texts.values())))
        made |= {row: known[text] for row, text in texts.items()}
        for row, query in enumerate(queries):
            if query.kind == "item":
                feature = self.images.feature_of(query.value)
                if feature is None:
                    raise KeyError(f"image {query.value} is not in the index")
                made[row] = feature[0]
        return torch.stack([made[row].float() for row in range(len(queries))])

    def _text_features(self, texts: Sequence[str]) -> dict[str, Tensor]:
        new = [text for text in texts if text not in self._known]
        if new:
            self._known |= dict(zip(new, self.model.encoder.encode_texts(new).cpu(), strict=True))
        found = {text: self._known[text] for text in texts}
        for text in texts:
            self._known.move_to_end(text)
        while len(self._known) > _KNOWN_TEXTS:
            self._known.popitem(last=False)
        return found


def _pairs(found: Found, row: int, count: int) -> list[tuple[int, float]]:
    """(item, score) of the first `count` that were found."""
    items, scores = found.items[row, :count].tolist(), found.scores[row, :count].tolist()
    return [(item, score) for item, score in zip(items, scores, strict=True) if item >= 0]


class _Cache:
    """The encoded images that were asked for last, up to `limit` bytes; used by several threads."""

    def __init__(self, limit: int) -> None:
        self._limit, self._bytes = limit, 0
        self._entries: OrderedDict[int, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: int, make: Callable[[int], bytes]) -> bytes:
        """The entry, made outside the lock where there is none."""
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
                return self._entries[key]
        value = make(key)
        with self._lock:
            if key not in self._entries:
                self._bytes += len(value)
                self._entries[key] = value
            while self._bytes > self._limit and len(self._entries) > 1:
                self._bytes -= len(self._entries.popitem(last=False)[1])
        return value
