"""Hits and misses for the reports of the benchmarks, with the pictures and captions that were retrieved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
from torch import Tensor

from llm2clip.data.images import decode_image
from llm2clip.evaluation.benchmark import shown_model
from llm2clip.evaluation.datasets import ImageReader
from llm2clip.evaluation.features import Rows
from llm2clip.evaluation.measured import DIRECTIONS, Direction, Measured
from llm2clip.evaluation.samples import ANSWERS, Answer, QuerySample, draw_queries, thumbnail
from llm2clip.settings import BenchmarkSettings
from llm2clip_kernels import similarity_topk_stream

# kinds of captions shown with pictures: XM3600 has 36
_KINDS_OF_A_SET = 2


@dataclass(frozen=True)
class SampleGroup:
    """Sample queries under one heading."""

    heading: str
    queries: list[QuerySample]


def retrieval_samples(measured: Sequence[Measured], settings: BenchmarkSettings) -> list[SampleGroup]:
    """Sample queries of the last model on the first kinds of captions of every data set."""
    groups: list[SampleGroup] = []
    seen: dict[str, int] = {}
    for kind in measured:
        seen[kind.data.name] = seen.get(kind.data.name, 0) + 1
        if seen[kind.data.name] > _KINDS_OF_A_SET or settings.samples == 0:
            continue
        for direction in DIRECTIONS:
            queries = _queries(kind, direction, settings)
            groups.append(SampleGroup(f"{kind.title}: {direction}", queries))
    return groups


def _queries(kind: Measured, direction: Direction, settings: BenchmarkSettings) -> list[QuerySample]:
    label = shown_model(kind.ranks)
    pairing = kind.pairing
    assert pairing is not None
    texts, images = kind.queries(label), kind.gallery(label)
    picture = partial(_picture, kind)
    to_image = direction == "text → image"
    ranks = kind.of(direction)[label].expected_rank()
    count = settings.samples if to_image else (settings.samples + 1) // 2
    chosen = draw_queries(ranks, count, settings.seed)
    queries: Rows = texts if to_image else images
    answers: Rows = images if to_image else texts
    groups = (pairing.text_groups, pairing.image_groups)
    own, others = groups if to_image else groups[::-1]
    shown = []
    for query in chosen:
        right = np.flatnonzero(others == own[query])
        listed = best_answers(queries, answers, query, right, ranks[query])
        captions = (
            [kind.captions.texts[pairing.text_rows[row]] for _, row, _ in listed] if not to_image else []
        )
        shown.append(
            QuerySample(
                kind=kind.captions.kind,
                rank=max(1, round(float(ranks[query]))),
                gallery=len(answers),
                answers=[
                    Answer(
                        place,
                        similarity,
                        bool((right == row).any()),
                        picture(row) if to_image else None,
                        "" if to_image else captions[number],
                    )
                    for number, (place, row, similarity) in enumerate(listed)
                ],
                picture=None if to_image else picture(query),
                text=kind.captions.texts[pairing.text_rows[query]] if to_image else "",
            )
        )
    return shown


def best_answers(
    queries: Rows | Tensor, answers: Rows | Tensor, query: int, right: npt.NDArray[np.int64], rank: float
) -> list[tuple[int, int, float]]:
    """(place, row, similarity) of the best answers, and of the best right one where it is not among them."""
    asked = queries[[query]]
    scores, rows = similarity_topk_stream(asked, answers, min(ANSWERS, len(answers)))
    listed = [
        (place, row, score)
        for place, (row, score) in enumerate(zip(rows[0].tolist(), scores[0].tolist(), strict=True), 1)
    ]
    if not np.isin(rows[0].numpy(), right).any():
        similarities = (answers[right] @ asked[0]).numpy()
        best = int(similarities.argmax())
        place = max(len(listed) + 1, round(float(rank)))
        listed.append((place, int(right[best]), float(similarities[best])))
    return listed


def _picture(kind: Measured, row: int) -> bytes:
    assert kind.pairing is not None
    rows, images = kind.pairing.image_rows, kind.data.images
    if row < len(rows):
        number = int(rows[row])
    else:
        assert kind.strangers is not None
        images = kind.strangers
        number = int(kind.of_strangers[shown_model(kind.ranks)].numbers[row - len(rows)])
    return thumbnail(decode_image(images.read(number), key=images.key(number)))


def classification_sample(
    images: ImageReader,
    row: int,
    names: Sequence[str],
    label: int,
    best: Sequence[tuple[int, float]],
    rank: float,
) -> QuerySample:
    """One image with the classes that the model thinks of, the right one marked.

    Args:
        images: the images.
        row: which of them.
        names: class names.
        label: the right class.
        best: (class, similarity), best first.
        rank: expected rank of the right class.
    """
    return QuerySample(
        kind=names[label],
        rank=max(1, round(rank)),
        gallery=len(names),
        answers=[
            Answer(place, similarity, number == label, None, names[number])
            for place, (number, similarity) in enumerate(best, 1)
        ],
        picture=thumbnail(decode_image(images.read(row), key=images.key(row))),
        text=f"{names[label]}",
    )
