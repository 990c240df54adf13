"""What zero-shot classification and the linear probe share: scores per class, comparisons, predictions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llm2clip.evaluation.benchmark import baseline_of, compare
from llm2clip.evaluation.ranks import Ranks, summarise
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


def classification_rows(
    ranks: Mapping[tuple[str, str], Ranks], labels: Ints, classes: int, what: str, settings: BenchmarkSettings
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Scores of every classifier of every model, and each model against the baseline.

    Args:
        ranks: (classifier, model) -> rank of every image's class.
        labels: (N,) class of each image.
        classes: number of classes.
        what: what the rows call the classifier.
        settings: baseline, resamples and seed.

    Returns:
        Rows `{what, model, scores}`, classifier by classifier, and rows of `compare` with `title` and `measure`.
    """
    rows: list[dict[str, Any]] = []
    comparisons: list[dict[str, Any]] = []
    baseline = baseline_of(settings)
    for title in dict.fromkeys(title for title, _ in ranks):
        of_models = {label: own for (other, label), own in ranks.items() if other == title}
        for label, own in of_models.items():
            rows.append({what: title, "model": label, "scores": class_scores(own, labels, classes, settings)})
        if baseline is not None:
            values = {label: own.recall(1) for label, own in of_models.items()}
            comparisons += [
                {"title": title, "measure": "top-1", **row}
                for row in compare(values, baseline, None, settings)
            ]
    return rows, comparisons


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
