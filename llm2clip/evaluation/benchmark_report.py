"""report.html of the benchmarks: headline figures, tables, sample queries, setup."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from llm2clip.evaluation import html
from llm2clip.evaluation.benchmark import shown_model
from llm2clip.evaluation.benchmark_samples import SampleGroup
from llm2clip.evaluation.benchmark_tables import many_kinds
from llm2clip.evaluation.figures import recall_bars
from llm2clip.evaluation.tables import Table, percent
from llm2clip.progress import format_seconds

_BARS = 8  # data sets in one chart


def retrieval_page(
    results: Mapping[str, Any], tables: Sequence[Table], samples: Sequence[SampleGroup]
) -> str:
    """The page of `evaluate retrieval`."""
    rows = results["retrieval"]
    model = shown_model(results["setup"]["models"])
    k = next(iter(rows[0]["scores"]["recall"]))
    own = [row for row in rows if row["model"] == model]
    cards = [
        (
            f"{row['title']}, {row['direction']}, R@{k}",
            f"{percent(row['scores']['recall'][k])} %",
            f"chance {percent(row['scores']['chance'][k])} %",
        )
        for row in own[:8]
    ]
    data = results["datasets"].values()
    lead = (
        f"{_count(len(results['setup']['models']), 'model')} on {_count(len(data), 'data set')}. Beside every figure "
        "stands what guessing would give."
    )
    sections = [
        ("Results", _bars(rows, k) + _tables(tables) + f'<p class="note">{html.BOOTSTRAP_NOTE}</p>'),
        ("Sample queries", sample_section(samples, model)),
        ("Setup", setup_section(results)),
        ("Data, licence and attribution", html.attribution(_credits(results["datasets"]))),
    ]
    return html.page("Retrieval benchmarks", lead, html.card_row(cards), sections)


def classification_page(
    title: str,
    results: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    what: str,
    tables: Sequence[Table],
    samples: Sequence[SampleGroup],
    charts: str = "",
) -> str:
    """The page of a classification benchmark.

    Args:
        title: heading.
        results: of the benchmark.
        rows: its rows `{what, model, scores}`.
        what: what distinguishes the rows of one model.
        tables, samples: as they are shown.
        charts: further charts as HTML.
    """
    models = list(results["setup"]["models"])
    model = shown_model(models)
    cards = [
        (
            f"{row[what]}, top-1",
            f"{percent(row['scores']['recall']['1'])} %",
            f"{model}; chance {percent(row['scores']['chance']['1'])} %",
        )
        for row in rows
        if row["model"] == model
    ]
    kinds = list(dict.fromkeys(row[what] for row in rows))
    found = {(row[what], row["model"]): row["scores"] for row in rows}
    series = {name: [found[kind, name]["recall"]["1"] for kind in kinds] for name in models}
    chance = [found[kind, models[0]]["chance"]["1"] for kind in kinds]
    bars = html.chart(recall_bars(kinds, series, chance, f"top-1 by {what}"), "Top-1 accuracy in %.")
    about = results["datasets"].get("test") or next(iter(results["datasets"].values()))
    lead = (
        f"{_count(len(models), 'model')} on {about['images']} images of {about['classes']} classes. Beside every "
        "figure stands what guessing would give."
    )
    note = (
        "Small figures: 95 % interval (bootstrap over images). Ties are broken at random, in expectation, so features "
        "that tell nothing apart score chance."
    )
    sections = [
        ("Results", f'{bars}{charts}{_tables(tables)}<p class="note">{note}</p>'),
        ("Sample images", sample_section(samples, model)),
        ("Setup", setup_section(results)),
    ]
    return html.page(title, lead, html.card_row(cards), sections)


def _tables(tables: Sequence[Table]) -> str:
    return "".join(html.table(table) for table in tables)


def _bars(rows: Sequence[Mapping[str, Any]], k: str) -> str:
    """One chart per direction: a group of bars per data set, a bar per model."""
    charts = []
    many = many_kinds(rows)
    if len(many) == len({row["dataset"] for row in rows}):
        return ""
    for direction in dict.fromkeys(row["direction"] for row in rows):
        own = [row for row in rows if row["direction"] == direction and row["dataset"] not in many]
        titles = list(dict.fromkeys(row["title"] for row in own))[:_BARS]
        models = list(dict.fromkeys(row["model"] for row in own))
        found = {(row["title"], row["model"]): row["scores"] for row in own}
        series = {model: [found[title, model]["recall"][k] for title in titles] for model in models}
        chance = [found[title, models[0]]["chance"][k] for title in titles]
        picture = recall_bars(titles, series, chance, f"R@{k} {direction}")
        charts.append(html.chart(picture, f"R@{k}, {direction}, in %."))
    return "".join(charts)


def sample_section(samples: Sequence[SampleGroup], model: str) -> str:
    """Sample queries under their headings."""
    if not samples:
        return ""
    parts = [
        f"<h3>{escape(group.heading)}</h3>{''.join(map(html.query, group.queries))}" for group in samples
    ]
    note = (
        f"<p>Hits and misses of {escape(model)}: the best answers from left to right or top to bottom, the right ones "
        "framed in green.</p>"
    )
    return note + "".join(parts)


def setup_section(results: Mapping[str, Any]) -> str:
    """Models, data, versions, settings."""
    setup = results["setup"]
    lines: dict[str, str] = {}
    for label, about in setup["models"].items():
        lines[f"model {label}"] = ", ".join(
            f"{name.replace('_', ' ')}: {value}" for name, value in about.items()
        )
    lost: list[str] = []
    for about in results["datasets"].values():
        lines[f"data set {about['title']}"] = _sizes(about)
        lost += about["unusable images"]
    lines |= {f"version of {name}": value for name, value in setup["versions"].items()}
    lines |= {"time": format_seconds(setup["seconds"]), "processes": str(setup["ranks"])}
    return (
        html.definitions(lines)
        + html.details("Settings of this evaluation", setup["settings"])
        + html.details("Images that could not be used", lost)
    )


def _sizes(about: Mapping[str, Any]) -> str:
    text = f"{about['images']} images"
    if about.get("captions"):
        total = sum(about["captions"].values())
        text += f", {total} captions" + (
            f" of {len(about['captions'])} kinds" if len(about["captions"]) > 1 else ""
        )
    if about.get("classes"):
        text += f", {about['classes']} classes"
    if about["unusable images"]:
        text += f"; without {len(about['unusable images'])} images that could not be used"
    return text


def _credits(datasets: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    return {
        f"{about['title']}, {name}": values
        for about in datasets.values()
        for name, values in about.get("credit", {}).items()
    }


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")
