"""Tables of the retrieval benchmark: an overview as papers have it, all figures, languages, comparisons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llm2clip.evaluation.tables import Table, percent

Row = Mapping[str, Any]
_SIGN = {"image → text": "I→T", "text → image": "T→I"}
# a data set with more kinds of captions is one of languages: it gets a table, and one line in the overview
_MANY_KINDS = 4


def retrieval_tables(results: Mapping[str, Any]) -> list[Table]:
    """Every table that the results have rows for."""
    rows: list[Row] = results["retrieval"]
    many = many_kinds(rows)
    tables = [overview(rows, many), paper_table(rows, many)]
    tables += [language_table([row for row in rows if row["dataset"] == name]) for name in many]
    tables.append(full_table([row for row in rows if row["dataset"] not in many]))
    tables.append(comparison_table(results["comparisons"], many))
    return [table for table in tables if table.rows]


def many_kinds(rows: Sequence[Row]) -> list[str]:
    """Data sets with so many kinds of captions that they are languages."""
    kinds: dict[str, set[str]] = {}
    for row in rows:
        kinds.setdefault(row["dataset"], set()).add(row["captions"])
    return [name for name, own in kinds.items() if len(own) > _MANY_KINDS]


def overview(rows: Sequence[Row], many: Sequence[str] = ()) -> Table:
    """First recall of every model on every data set, both directions, with chance and the mean.

    Args:
        rows: `retrieval` of the results.
        many: data sets whose kinds of captions are averaged into one line.
    """
    k = _first_k(rows)
    models = list(dict.fromkeys(row["model"] for row in rows))
    lines: dict[tuple[str, str], dict[str, list[float]]] = {}
    for row in rows:
        averaged = row["dataset"] in many
        title = f"{row['title'].partition(',')[0]}, mean of languages" if averaged else row["title"]
        line = lines.setdefault((title, row["direction"]), {name: [] for name in ("chance", *models)})
        line[row["model"]].append(row["scores"]["recall"][k])
        if row["model"] == models[0]:
            line["chance"].append(row["scores"]["chance"][k])
    means = {key: {name: _mean(values) for name, values in line.items()} for key, line in lines.items()}
    body = [(title, direction, values) for (title, direction), values in means.items()]
    if len({title for title, _, _ in body}) > 1:
        for direction in dict.fromkeys(direction for _, direction, _ in body):
            own = [values for _, other, values in body if other == direction]
            body.append(
                ("mean", direction, {name: _mean([v[name] for v in own]) for name in ("chance", *models)})
            )
    cells = [
        [title, direction, *(percent(values[name]) for name in ("chance", *models))]
        for title, direction, values in body
    ]
    return Table(
        f"Image–text retrieval, R@{k}",
        f"Recall at {k} in %, the best in bold. Chance is that of a random order.",
        ["data set", "direction", "chance", *models],
        cells,
        2,
        strong=strongest(cells, 3),
    )


def language_table(rows: Sequence[Row]) -> Table:
    """First recall in every language, a pair of columns per model."""
    k = _first_k(rows)
    models = list(dict.fromkeys(row["model"] for row in rows))
    languages = list(dict.fromkeys(row["captions"] for row in rows))
    columns = [(model, direction) for model in models for direction in ("image → text", "text → image")]
    found = {(row["captions"], row["model"], row["direction"]): row["scores"] for row in rows}
    values = [[found[(language, *column)]["recall"][k] for column in columns] for language in languages]
    cells = [
        [language, percent(found[(language, *columns[0])]["chance"][k]), *map(percent, own)]
        for language, own in zip(languages, values, strict=True)
    ]
    chances = [found[(language, *columns[0])]["chance"][k] for language in languages]
    means = [_mean([own[number] for own in values]) for number in range(len(columns))]
    cells.append(["mean", percent(_mean(chances)), *map(percent, means)])
    title = rows[0]["title"].partition(",")[0]
    return Table(
        f"{title} by language, R@{k}",
        f"Recall at {k} in %, from images to texts (I→T) and from texts to images (T→I).",
        ["language", "chance", *(_SIGN[direction] for _, direction in columns)],
        cells,
        1,
        strong=_strong_columns(cells, models),
        groups=tuple((model, 2) for model in models),
    )


def _strong_columns(cells: Sequence[Sequence[str]], models: Sequence[str]) -> frozenset[tuple[int, int]]:
    """The best model in every line of a language table, for each direction."""
    found: set[tuple[int, int]] = set()
    for number, row in enumerate(cells):
        for offset in range(2):
            own = {2 + offset + 2 * m: float(row[2 + offset + 2 * m]) for m in range(len(models))}
            if len(own) > 1:
                found |= {(number, column) for column, value in own.items() if value == max(own.values())}
    return frozenset(found)


def paper_table(rows: Sequence[Row], many: Sequence[str] = ()) -> Table:
    """The overview with a line per model and a pair of columns per data set, as papers print it."""
    sideways = overview(rows, many)
    titles = list(dict.fromkeys(row[0] for row in sideways.rows))
    names = sideways.header[2:]
    cells = [[name, *(row[2 + number] for row in sideways.rows)] for number, name in enumerate(names)]
    strong = frozenset((column - 2, 1 + row) for row, column in sideways.strong)
    order = [row[1] for row in sideways.rows]
    return Table(
        sideways.title + " by model",
        "Recall in %, from images to texts (I→T) and from texts to images (T→I), the best in bold.",
        ["model", *(_SIGN[direction] for direction in order)],
        cells,
        1,
        strong=strong,
        groups=tuple((title, sum(row[0] == title for row in sideways.rows)) for title in titles),
    )


def full_table(rows: Sequence[Row]) -> Table:
    """All recalls, median rank and sizes; chance above the models."""
    if not rows:
        return Table("All figures", "", [], [], 3)
    ks = list(rows[0]["scores"]["recall"])
    cells: list[list[str]] = []
    small: list[list[str]] = []
    strong: set[tuple[int, int]] = set()
    for key in dict.fromkeys((row["title"], row["direction"]) for row in rows):
        own = [row for row in rows if (row["title"], row["direction"]) == key]
        scores = own[0]["scores"]
        sizes = [str(scores["queries"]), str(scores["gallery"])]
        cells.append([*key, "chance", *(percent(scores["chance"][k]) for k in ks), "", *sizes])
        small.append([""] * len(cells[-1]))
        start = len(cells)
        for row in own:
            scores = row["scores"]
            recall = [percent(scores["recall"][k]) for k in ks]
            cells.append([*key, row["model"], *recall, f"{scores['median_rank']:.0f}", *sizes])
            ranges = [interval(scores["interval"][k]) for k in ks]
            small.append(["", "", "", *ranges, "", "", ""])
        if len(own) > 1:
            for column in range(3, 3 + len(ks)):
                strong |= _best([row[column] for row in cells[start:]], start, column)
    return Table(
        "Image–text retrieval, all figures",
        "Recall in % (95 % intervals: report.html and results.json); median rank of the best right answer.",
        ["data set", "direction", "model", *(f"R@{k}" for k in ks), "median rank", "queries", "gallery"],
        cells,
        3,
        small,
        frozenset(strong),
    )


def comparison_table(rows: Sequence[Row], many: Sequence[str] = (), *, heading: str = "prompts") -> Table:
    """Differences from the baseline with paired intervals; certain ones in bold."""
    own = [row for row in rows if row.get("dataset") not in many]
    cells, strong = [], set()
    for number, row in enumerate(own):
        where = [row["title"], row["direction"]] if "direction" in row else [row["title"]]
        difference = f"{100 * row['difference']:+.1f}".replace("-", "−")
        cells.append(
            [*where, row["model"], row["measure"], difference, interval(row["interval"], signed=True)]
        )
        if row["certain"]:
            strong.add((number, len(cells[-1]) - 2))
    head = ["data set", "direction"] if own and "direction" in own[0] else [heading]
    baseline = own[0]["baseline"] if own else ""
    return Table(
        f"Difference from {baseline}",
        f"Percentage points above {baseline} on the same queries, with the paired 95 % bootstrap interval; in bold "
        "where it leaves 0 out.",
        [*head, "model", "measure", "difference", "95 % interval"],
        cells,
        len(head) + 2,
        strong=frozenset(strong),
    )


def strongest(cells: Sequence[Sequence[str]], first: int) -> frozenset[tuple[int, int]]:
    """The largest figure of every row among the columns from `first` on; none where there is one column."""
    found: set[tuple[int, int]] = set()
    for number, row in enumerate(cells):
        if len(row) - first > 1:
            most = max(float(cell) for cell in row[first:])
            found |= {(number, first + c) for c, cell in enumerate(row[first:]) if float(cell) == most}
    return frozenset(found)


def interval(values: Sequence[float], *, signed: bool = False) -> str:
    """`12.3–14.5`, or `−0.3 to +1.2`."""
    low, high = values
    if signed:
        return f"{100 * low:+.1f} to {100 * high:+.1f}".replace("-", "−")
    return f"{percent(low)}–{percent(high)}"


def _best(column: Sequence[str], start: int, number: int) -> set[tuple[int, int]]:
    most = max(map(float, column))
    return {(start + row, number) for row, cell in enumerate(column) if float(cell) == most}


def _first_k(rows: Sequence[Row]) -> str:
    return str(next(iter(rows[0]["scores"]["recall"])))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
