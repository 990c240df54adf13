"""What zero-shot classification and the linear probe share: scores per class, confusions, tables, samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llm2clip.evaluation.benchmark_samples import classification_sample
from llm2clip.evaluation.datasets import ImageReader
from llm2clip.evaluation.ranks import Ranks, summarise
from llm2clip.evaluation.samples import QuerySample, draw_queries
from llm2clip.evaluation.tables import Table, percent
from llm2clip.settings import BenchmarkSettings
from llm2clip_kernels import similarity_topk

KS = (1, 5)
_BEST = 5
_BLOCK = 8192  # images whose predictions are computed at a time
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


def class_scores(ranks: Ranks, labels: Ints, classes: int, settings: BenchmarkSettings) -> dict[str, Any]:
    """Accuracy of a classifier as JSON values.

    Args:
        ranks: rank of every image's class.
        labels: (N,) class of each image.
        classes: number of classes.
        settings: resamples and seed.

    Returns:
        What `summarise` returns for k = 1 and 5, `per_class` (top-1 of each class, None where it has no
        image) and `mean_per_class`.
    """
    scores = summarise(ranks, ks=KS, seed=settings.seed, resamples=settings.resamples)
    counts = np.bincount(labels, minlength=classes)
    right = np.bincount(labels, ranks.recall(1), minlength=classes)
    per_class = [float(r / n) if n else None for r, n in zip(right, counts, strict=True)]
    known = [value for value in per_class if value is not None]
    return {**scores, "per_class": per_class, "mean_per_class": float(np.mean(known))}


def accuracy_table(rows: Sequence[Mapping[str, Any]], title: str, note: str, what: str) -> Table:
    """Top-1, top-5 and the mean over classes; a line of chance, then the models under each heading.

    Args:
        rows: `{what, model, scores}`.
        title, note: of the table.
        what: name of the first column, and where its cells are in a row.
    """
    scores = rows[0]["scores"]
    sizes = [str(scores["queries"]), str(len(scores["per_class"]))]
    chance = [percent(scores["chance"][str(k)]) for k in KS]
    cells = [["", "chance", *chance, chance[0], *sizes]]
    small = [[""] * len(cells[0])]
    for row in rows:
        own = row["scores"]
        recall = [percent(own["recall"][str(k)]) for k in KS]
        cells.append([row[what], row["model"], *recall, percent(own["mean_per_class"]), *sizes])
        ranges = [f"{percent(low)}–{percent(high)}" for low, high in (own["interval"][str(k)] for k in KS)]
        small.append(["", "", *ranges, "", "", ""])
    strong: set[tuple[int, int]] = set()
    for name in dict.fromkeys(row[what] for row in rows):
        own_rows = [number for number, row in enumerate(cells) if row[0] == name]
        for column in range(2, 5) if len(own_rows) > 1 else ():
            most = max(float(cells[number][column]) for number in own_rows)
            strong |= {(number, column) for number in own_rows if float(cells[number][column]) == most}
    header = [what, "model", "top-1", "top-5", "mean per class", "images", "classes"]
    return Table(title, note, header, cells, 2, small, frozenset(strong))


@dataclass(frozen=True)
class Predictions:
    """What one classifier says of every image.

    Attributes:
        title: which classifier.
        rows: (N,) rows of the images.
        labels: (N,) their classes.
        best: (N, k) classes, best first.
        scores: (N, k) their scores.
        ranks: (N,) expected rank of the right class.
    """

    title: str
    rows: Ints
    labels: Ints
    best: Ints
    scores: Floats
    ranks: Floats


def predict(title: str, images: Any, classes: Tensor, rows: Ints, labels: Ints, ranks: Ranks) -> Predictions:
    """The best classes of every image, by dot product.

    Args:
        title: which classifier.
        images: (N, D) array with slices of rows.
        classes: (C, D).
        rows: (N,) rows of the images in their reader.
        labels: (N,) their classes.
        ranks: of the right classes.
    """
    k = min(_BEST, len(classes))
    found = [
        similarity_topk(images[slice(start, start + _BLOCK)], classes, k)
        for start in range(0, len(images), _BLOCK)
    ]
    scores, best = (torch.cat(side).numpy() for side in zip(*found, strict=True))
    return Predictions(title, rows, labels, best, scores.astype(np.float64), ranks.expected_rank())


def class_table(names: Sequence[str], per_class: Sequence[float | None], title: str, count: int) -> Table:
    """The classes that are recognised worst and best, `count` of each."""
    known = [(value, name) for name, value in zip(names, per_class, strict=True) if value is not None]
    ordered = sorted(known)
    if len(ordered) <= 2 * count:
        cells = [["all", name, percent(value)] for value, name in ordered]
    else:
        cells = [["worst", name, percent(value)] for value, name in ordered[:count]]
        cells += [["best", name, percent(value)] for value, name in ordered[: -count - 1 : -1]]
    return Table(
        "Classes", f"Top-1 accuracy of {title} in % for single classes.", ["", "class", "top-1"], cells, 2
    )


def confusion_table(predictions: Predictions, names: Sequence[str], count: int) -> Table:
    """Which classes are taken for which others most often."""
    wrong = predictions.best[:, 0] != predictions.labels
    pairs = zip(predictions.labels[wrong].tolist(), predictions.best[wrong, 0].tolist(), strict=True)
    totals = np.bincount(predictions.labels, minlength=len(names))
    cells = [
        [names[right], names[taken], str(times), percent(times / totals[right])]
        for (right, taken), times in sorted(Counter(pairs).items(), key=lambda item: (-item[1], item[0]))[
            :count
        ]
    ]
    return Table(
        "Confusions",
        f"Images of one class that {predictions.title} takes for another, the most frequent first; share of the class "
        "in %.",
        ["class", "taken for", "images", "share"],
        cells,
        2,
    )


def prediction_samples(
    predictions: Predictions, images: ImageReader, names: Sequence[str], settings: BenchmarkSettings
) -> list[QuerySample]:
    """Sample images, half of them hits, with the classes that the classifier thinks of."""
    chosen = draw_queries(predictions.ranks, settings.samples, settings.seed)
    return [
        classification_sample(
            images,
            int(predictions.rows[query]),
            names,
            int(predictions.labels[query]),
            list(zip(predictions.best[query].tolist(), predictions.scores[query].tolist(), strict=True)),
            float(predictions.ranks[query]),
        )
        for query in chosen
    ]
