"""Tables of `evaluate caption-retrieval`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llm2clip.evaluation.benchmark_tables import comparison_table, interval
from llm2clip.evaluation.captions.base import UNREADABLE
from llm2clip.evaluation.ranks import KS
from llm2clip.evaluation.tables import Table, percent

Row = Mapping[str, Any]


def caption_tables(results: Mapping[str, Any]) -> list[Table]:
    """Every table that the results have rows for."""
    rows: list[Row] = results["caption_retrieval"]
    tables = [
        retrieval_table([row for row in rows if (row["set"], row["pairs"]) == key], results["data"][key[0]])
        for key in dict.fromkeys((row["set"], row["pairs"]) for row in rows)
    ]
    tables += [
        similarity_table(results["similarity"], results["sentence pairs"]),
        reduced_table(results["reduced"]),
        geometry_table(results["geometry"]),
        throughput_table(results["throughput"], results["setup"]["models"]),
        comparison_table(results["comparisons"]),
    ]
    return [table for table in tables if table.rows]


def retrieval_table(rows: Sequence[Row], about: Mapping[str, Any]) -> Table:
    """CRA of one set: a line per encoder under each direction, chance first, the best in bold."""
    cells: list[list[str]] = []
    small: list[list[str]] = []
    strong: set[tuple[int, int]] = set()
    for direction in dict.fromkeys(row["direction"] for row in rows):
        own = [row for row in rows if row["direction"] == direction]
        scores = own[0]["scores"]
        cells.append([direction, "chance", *(percent(scores["chance"][str(k)]) for k in KS), ""])
        small.append([""] * len(cells[-1]))
        start = len(cells)
        for row in own:
            scores = row["scores"]
            recall = [percent(scores["recall"][str(k)]) for k in KS]
            cells.append([direction, row["encoder"], *recall, f"{scores['median_rank']:.0f}"])
            small.append(["", "", *(interval(scores["interval"][str(k)]) for k in KS), ""])
        if len(own) > 1:
            for column in range(2, 2 + len(KS)):
                most = max(float(cells[number][column]) for number in range(start, len(cells)))
                strong |= {
                    (number, column)
                    for number in range(start, len(cells))
                    if float(cells[number][column]) == most
                }
    name, pairs = rows[0]["set"], rows[0]["pairs"]
    title = "Cross-lingual caption retrieval" if "↔" in pairs else "Caption retrieval accuracy (CRA)"
    return Table(
        f"{title}: {name}" + ("" if pairs == "captions" else f", {pairs}"),
        _note(rows, about),
        ["direction", "encoder", *(f"R@{k}" for k in KS), "median rank"],
        cells,
        2,
        small,
        frozenset(strong),
    )


def _note(rows: Sequence[Row], about: Mapping[str, Any]) -> str:
    pairs = rows[0]["pairs"]
    what = "The first captions" if "↔" in pairs else "The first two captions"
    note = f"{what} of {about['pairs'][pairs]} images look for each other; recall in %."
    if about["selected"]:
        note += f" Of the files: {about['selected']}."
    lost = {
        reason: entry["images"]
        for reason, entry in about["left out"].items()
        if reason.startswith(f"{pairs}:") or reason == UNREADABLE
    }
    note += "".join(f" Left out: {count} ({reason})." for reason, count in lost.items())
    if about["empty captions"]:
        note += f" {about['empty captions']} captions without text do not count."
    if about["equal captions"][pairs]:
        note += f" {about['equal captions'][pairs]} of them have two equal captions and are kept."
    return note


def similarity_table(rows: Sequence[Row], about: Mapping[str, Any]) -> Table:
    """Correlation with human scores."""
    cells = [
        [
            row["set"],
            row["encoder"],
            f"{100 * row['spearman']:.1f}",
            interval(row["interval"]),
            str(row["pairs"]),
        ]
        for row in rows
    ]
    lost = {name: len(entry["left out"]) for name, entry in about.items() if entry["left out"]}
    note = "Spearman's correlation of cosine similarity and human score, times 100, with its 95 % interval."
    note += "".join(
        f" {name}: {count} lines without score or sentence left out." for name, count in lost.items()
    )
    strong = set()
    for name in dict.fromkeys(row["set"] for row in rows):
        own = [number for number, row in enumerate(rows) if row["set"] == name]
        most = max(float(cells[number][2]) for number in own)
        strong |= {(number, 2) for number in own if len(own) > 1 and float(cells[number][2]) == most}
    return Table(
        "Sentence similarity",
        note,
        ["data set", "encoder", "Spearman", "95 % interval", "pairs"],
        cells,
        2,
        strong=frozenset(strong),
    )


def reduced_table(rows: Sequence[Row]) -> Table:
    """Prefixes and stored precisions beside the whole fp32 embedding."""
    cells = []
    for row in rows:
        where = [row["set"], row["pairs"], row["encoder"], str(row["dim"]), row["dtype"]]
        if "left out" in row:
            cells.append([*where, *[""] * 5])
            continue
        both = []
        for found in row["directions"].values():
            change = f"{100 * found['difference']:+.1f}".replace("-", "−")
            both += [percent(found["recall"]["1"]), change]
        cells.append([*where, f"{row['bytes']:.0f}", *both])
    return Table(
        "Fewer dimensions, lower precision",
        "R@1 in % in both directions (those of the tables above, in their order) and its change from the whole fp32 "
        "embedding, in percentage points (intervals: results.json); bytes of a caption in a store. Prefixes are of "
        "use where the encoder was trained for them. A line without figures: the encoder has fewer values.",
        ["data set", "pairs", "encoder", "dim", "dtype", "bytes", "R@1 →", "change", "R@1 ←", "change"],
        cells,
        5,
    )


def geometry_table(rows: Sequence[Row]) -> Table:
    """Alignment and uniformity."""
    cells = [
        [row["set"], row["pairs"], row["encoder"], f"{row['alignment']:.3f}", f"{row['uniformity']:.3f}"]
        for row in rows
    ]
    return Table(
        "Alignment and uniformity",
        "Mean squared distance of the two captions of an image, and log of the mean of exp(−2 d²) over captions of "
        "different images, all of unit norm (Wang and Isola, 2020). Lower is better for both.",
        ["data set", "pairs", "encoder", "alignment", "uniformity"],
        cells,
        3,
    )


def throughput_table(rows: Sequence[Row], models: Mapping[str, Any]) -> Table:
    """Size and speed of every encoder, as it ran here."""
    cells = []
    for row in rows:
        about = models[row["encoder"]]
        parameters = about.get("parameters")
        cells.append(
            [
                row["encoder"],
                str(about["dimension"]),
                f"{parameters / 1e6:.1f}" if parameters else "",
                _rate(row["captions_per_second"]),
                _rate(row["tokens_per_second"]),
                "" if row["tokens"] is None else f"{row['tokens'] / row['captions']:.1f}",
                "" if row["truncated"] is None else str(row["truncated"]),
            ]
        )
    return Table(
        "Encoders",
        "Parameters in millions; speed of this run, tokenisation included (special tokens count, padding does not); "
        "captions that were cut to the encoder's limit.",
        ["encoder", "dim", "parameters", "captions/s", "tokens/s", "tokens a caption", "cut"],
        cells,
        1,
    )


def _rate(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"
