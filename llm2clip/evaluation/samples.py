"""Sample queries for the report: hits and misses, with the pictures and captions that were retrieved."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor

from llm2clip.evaluation.gallery import ROLES, Gallery, item_image
from llm2clip.evaluation.ranks import group_ids, rank_positives
from llm2clip.evaluation.retrieval import TextSide, similarity_block

THUMBNAIL = 144  # pixels; shown at half of it, for dense screens
ANSWERS = 5
HEAT_ITEMS = 40


@dataclass(frozen=True)
class Answer:
    """One retrieved item: `picture` (encoded image) or `text`, its place, and whether it is right."""

    place: int
    similarity: float
    right: bool
    picture: bytes | None = None
    text: str = ""


@dataclass(frozen=True)
class QuerySample:
    """One query with its best answers; the best right one is appended when it is not among them."""

    kind: str
    rank: int
    gallery: int
    answers: list[Answer]
    picture: bytes | None = None
    text: str = ""


@dataclass(frozen=True)
class ReportSamples:
    """What the report shows of single items.

    Attributes:
        text_to_image: kind of caption -> sample queries.
        image_to_text: kind of caption -> sample queries.
        heat: kind of caption -> cosine similarities, texts in rows and images in columns.
    """

    text_to_image: dict[str, list[QuerySample]] = field(default_factory=dict)
    image_to_text: dict[str, list[QuerySample]] = field(default_factory=dict)
    heat: dict[str, npt.NDArray[np.float32]] = field(default_factory=dict)


def collect_samples(
    gallery: Gallery, features: Tensor, sides: Sequence[TextSide], *, seed: int = 0, count: int = 6
) -> ReportSamples:
    """Draw sample queries for short and long captions, about half of them hits where there are any."""
    found = ReportSamples()
    pictures: dict[int, bytes] = {}

    def picture(row: int) -> bytes:
        if row not in pictures:
            pictures[row] = thumbnail(item_image(gallery.source, gallery.items[row]))
        return pictures[row]

    for side in sides:
        if side.kind not in ROLES:
            continue
        groups = group_ids(side.texts)
        own = features[side.rows]
        found.heat[side.kind] = similarity_block(features, side, HEAT_ITEMS)
        for queries, answers, to_image in ((side.features, own, True), (own, side.features, False)):
            ranks = rank_positives(queries, answers, groups, groups).expected_rank()
            samples = []
            for query in draw_queries(ranks, count if to_image else count // 2, seed):
                scores = (answers @ queries[query]).numpy()
                places = np.argsort(-scores, kind="stable")
                right = groups[places] == groups[query]
                shown = list(range(min(ANSWERS, len(places))))
                if not right[shown].any():
                    shown.append(int(np.flatnonzero(right)[0]))
                samples.append(
                    QuerySample(
                        kind=side.kind,
                        rank=int(np.flatnonzero(right)[0]) + 1,
                        gallery=len(places),
                        answers=[
                            Answer(
                                place + 1,
                                float(scores[places[place]]),
                                bool(right[place]),
                                picture(side.rows[places[place]]) if to_image else None,
                                "" if to_image else side.texts[places[place]],
                            )
                            for place in shown
                        ],
                        picture=None if to_image else picture(side.rows[query]),
                        text=side.texts[query] if to_image else "",
                    )
                )
            (found.text_to_image if to_image else found.image_to_text)[side.kind] = samples
    return found


def draw_queries(ranks: npt.NDArray[np.float64], count: int, seed: int) -> list[int]:
    """Indices of `count` queries, best ranks first: half hits (rank 1), the rest near and far misses.

    Where one sort is short of queries the others fill in, so a bad model shows its misses and a good one
    is not made to look worse than it is by much.
    """
    rng = np.random.default_rng(seed)
    hits = rng.permutation(np.flatnonzero(ranks < 2))
    near = rng.permutation(np.flatnonzero((ranks >= 2) & (ranks <= 10)))
    far = rng.permutation(np.flatnonzero(ranks > 10))
    wanted = [*hits[: (count + 1) // 2], *near[: count // 4], *far[: count // 4]]
    rest = [query for query in (*near, *far, *hits) if query not in set(wanted)]
    chosen = [int(query) for query in (wanted + rest)[:count]]
    return sorted(chosen, key=lambda query: (ranks[query], query))


def thumbnail(image: Any, side: int = THUMBNAIL, *, enlarge: bool = True) -> bytes:
    """A small PNG or JPEG of at most `side` pixels; pixel art is enlarged without smoothing, unless told not to."""
    small = max(image.size) * 2 <= side
    scale = side / max(image.size) if enlarge else min(1.0, side / max(image.size))
    size = tuple(max(1, round(length * scale)) for length in image.size)
    resized = image.resize(size, Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    if small:
        # few colours: a palette costs nothing and saves most of the bytes
        resized.quantize(128).save(buffer, "PNG", optimize=True)
    else:
        resized.save(buffer, "JPEG", quality=82)
    return buffer.getvalue()
