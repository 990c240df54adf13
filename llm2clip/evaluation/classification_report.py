"""Tables and page of a classification benchmark: accuracy, classes, confusions, sample images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llm2clip.evaluation.benchmark import write_results
from llm2clip.evaluation.benchmark_report import classification_page
from llm2clip.evaluation.benchmark_samples import SampleGroup, classification_sample
from llm2clip.evaluation.benchmark_tables import comparison_table
from llm2clip.evaluation.classification import KS, Predictions
from llm2clip.evaluation.datasets import ImageReader
from llm2clip.evaluation.samples import QuerySample, draw_queries
from llm2clip.evaluation.tables import Table, percent
from llm2clip.settings import BenchmarkSettings


def write_classification(
    out: Path,
    results: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    predictions: Predictions,
    images: ImageReader,
    *,
    what: str,
    title: str,
    note: str,
    settings: BenchmarkSettings,
    worst: int,
    charts: str = "",
) -> None:
    """Write results, tables and report, and print the tables.

    Args:
        out: directory.
        results: what results.json holds.
        rows: the rows of the benchmark among them, `{what, model, scores}`.
        predictions: of the classifier whose classes, confusions and samples are shown.
        images: the images tested.
        what: what distinguishes the rows of one model.
        title, note: of the main table.
        settings: samples and seed.
        worst: classes and confusions shown.
        charts: further charts of the page.
    """
    names: list[str] = results["classes"]
    shown = next(row for row in rows if f"{row['model']}, {row[what]}" == predictions.title)
    tables = [
        accuracy_table(rows, title, note, what),
        comparison_table(results["comparisons"], heading=what),
        class_table(names, shown["scores"]["per_class"], predictions.title, worst),
        confusion_table(predictions, names, worst),
    ]
    tables = [table for table in tables if table.rows]
    samples = SampleGroup(
        f"Images and the classes that {predictions.title} thinks of",
        prediction_samples(predictions, images, names, settings),
    )
    page = classification_page(title, results, rows, what, tables, [samples], charts)
    write_results(out, results, tables, page)


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
