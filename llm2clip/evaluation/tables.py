"""The result tables as aligned text for a terminal and as Markdown."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from llm2clip.evaluation.ranks import KS

_NOTE_WIDTH = 110  # characters of a line of explanation on a terminal


@dataclass(frozen=True)
class Table:
    """One table of results.

    Attributes:
        title: what was measured.
        note: how, in one or two sentences.
        header: column names; the first `labels` columns are words, the rest figures.
        rows: cells, already formatted.
        labels: number of leading columns that hold words.
        small: for each cell a remark in small print (95 % intervals), or ""; empty: no remarks.
        strong: (row, column) of the cells that stand out.
        groups: (heading, number of columns) of the last columns, where headings span several.
    """

    title: str
    note: str
    header: list[str]
    rows: list[list[str]]
    labels: int
    small: list[list[str]] = field(default_factory=list)
    strong: frozenset[tuple[int, int]] = frozenset()
    groups: tuple[tuple[str, int], ...] = ()

    def flat_header(self) -> list[str]:
        """Column names with the heading that spans them."""
        spanning = [name for name, count in self.groups for _ in range(count)]
        spanning = [""] * (len(self.header) - len(spanning)) + spanning
        return [f"{group} {name}".strip() for group, name in zip(spanning, self.header, strict=True)]


def percent(value: float) -> str:
    """`0.123` -> `12.3`."""
    return f"{100 * value:.1f}"


def caption_table(rows: Sequence[dict[str, Any]], *, cross_lingual: bool = False) -> Table | None:
    """Caption retrieval: a line per encoder under each direction, chance first; None without rows."""
    if not rows:
        return None
    cells, small = [], []
    for direction in dict.fromkeys(row["direction"] for row in rows):
        own = [row for row in rows if row["direction"] == direction]
        cells.append([direction, "chance", *_figures(own[0]["scores"], "chance")])
        cells += [[direction, row["encoder"], *_figures(row["scores"], "recall")] for row in own]
        small += [_blank(2), *(_intervals(row["scores"], 2) for row in own)]
    count = rows[0]["scores"]["gallery"]
    if cross_lingual:
        title = "Cross-lingual caption retrieval"
        note = "The translated caption looks for the caption it translates, and the other way round."
    else:
        title = "Caption retrieval accuracy (CRA)"
        note = f"Short and long captions of {count} held-out items look for each other; recall in %."
    return Table(
        title, note, ["direction", "encoder", *_recall_names(), "median rank", "items"], cells, 2, small
    )


def retrieval_table(rows: Sequence[dict[str, Any]], *, cross_lingual: bool = False) -> Table | None:
    """Image-text retrieval: the model and chance under each kind of caption; None without rows."""
    if not rows:
        return None
    cells, small = [], []
    for row in rows:
        small += [_blank(3), _intervals(row["scores"], 3)]
        cells.append([row["queries"], row["direction"], "chance", *_figures(row["scores"], "chance")])
        cells.append([row["queries"], row["direction"], "LLM2CLIP", *_figures(row["scores"], "recall")])
    title = "Cross-lingual image–text retrieval" if cross_lingual else "Image–text retrieval"
    note = (
        "Translated captions of the held-out images, embedded by the same LLM; recall in %."
        if cross_lingual
        else "Held-out images, one per group; recall in %. Items with the same caption are all right answers."
    )
    header = ["captions", "direction", "model", *_recall_names(), "median rank", "items"]
    return Table(title, note, header, cells, 3, small)


def result_tables(results: dict[str, Any]) -> list[Table]:
    """Every table that `results` (see `evaluate`) has rows for."""
    captions, images = results["caption_retrieval"], results["retrieval"]
    built = (
        caption_table([row for row in captions if row["pairs"] == "short ↔ long"]),
        caption_table([row for row in captions if row["pairs"] != "short ↔ long"], cross_lingual=True),
        retrieval_table([row for row in images if row["queries"] in ("short", "long")]),
        retrieval_table(
            [row for row in images if row["queries"] not in ("short", "long")], cross_lingual=True
        ),
    )
    return [table for table in built if table is not None]


def _recall_names() -> list[str]:
    return [f"R@{k}" for k in KS]


def _figures(scores: dict[str, Any], kind: str) -> list[str]:
    recall = [percent(scores[kind][str(k)]) for k in KS]
    if kind == "chance":
        return [*recall, "", str(scores["gallery"])]
    return [*recall, f"{scores['median_rank']:.0f}", str(scores["gallery"])]


def _blank(labels: int) -> list[str]:
    return [""] * (labels + len(KS) + 2)


def _intervals(scores: dict[str, Any], labels: int) -> list[str]:
    ranges = [f"{percent(low)}–{percent(high)}" for low, high in (scores["interval"][str(k)] for k in KS)]
    return [*[""] * labels, *ranges, "", ""]


def render_text(table: Table) -> str:
    """Aligned columns; a label that repeats the line above is left blank."""
    rows = blank_repeats(table)
    header = table.flat_header()
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        aligned = [
            cell.ljust(width) if column < table.labels else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join(aligned).rstrip()

    rule = "  ".join("-" * width for width in widths)
    note = textwrap.fill(table.note, _NOTE_WIDTH)
    return "\n".join([table.title, note, "", line(header), rule, *map(line, rows)])


def render_markdown(table: Table) -> str:
    """A GitHub-flavoured Markdown table under its title."""

    def line(cells: Sequence[str], number: int = -1) -> str:
        escaped = [cell.replace("|", "\\|") for cell in cells]
        marked = [f"**{c}**" if (number, column) in table.strong else c for column, c in enumerate(escaped)]
        return "| " + " | ".join(marked) + " |"

    rule = (
        "|"
        + "|".join("---" if column < table.labels else "---:" for column in range(len(table.header)))
        + "|"
    )
    rows = [line(row, number) for number, row in enumerate(table.rows)]
    return "\n".join([f"### {table.title}", "", table.note, "", line(table.flat_header()), rule, *rows])


def blank_repeats(table: Table) -> list[list[str]]:
    """The rows with labels blanked where they repeat the line above."""
    result: list[list[str]] = []
    above: list[str] = []
    for row in table.rows:
        cells = list(row)
        for column in range(table.labels):
            if above[: column + 1] != row[: column + 1]:
                break
            cells[column] = ""
        result.append(cells)
        above = row
    return result
