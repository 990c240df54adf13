"""report.html of `evaluate caption-retrieval`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from llm2clip.evaluation import html
from llm2clip.evaluation.figures import recall_bars
from llm2clip.evaluation.samples import QuerySample
from llm2clip.evaluation.tables import Table, percent
from llm2clip.progress import format_seconds

_BARS = 8  # directions in one chart


def caption_page(
    results: Mapping[str, Any], tables: Sequence[Table], samples: Mapping[str, Sequence[QuerySample]]
) -> str:
    """The whole page."""
    models = results["setup"]["models"]
    data = results["data"]
    lead = (
        f"{len(models)} encoder{'' if len(models) == 1 else 's'} on {len(data)} set{'' if len(data) == 1 else 's'} of "
        "captions. Beside every figure stands what guessing would give."
    )
    body = "".join(html.table(table) for table in tables)
    sections = [
        ("Results", f'{_bars(results)}{body}<p class="note">{html.BOOTSTRAP_NOTE}</p>'),
        ("Sample queries", _samples(samples, list(models)[-1])),
        ("Setup", _setup(results)),
        ("Data, licence and attribution", _data(data)),
    ]
    return html.page("Caption retrieval", lead, html.card_row(_cards(results)), sections)


def _cards(results: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The last encoder's R@1, with the baseline's before it."""
    rows = results["caption_retrieval"]
    shown, baseline = list(results["setup"]["models"])[-1], results["setup"]["baseline"]
    found = {(row["set"], row["pairs"], row["direction"], row["encoder"]): row["scores"] for row in rows}
    cards = []
    for name, pairs, direction, encoder in found:
        if encoder != shown:
            continue
        scores = found[name, pairs, direction, shown]
        value = f"{percent(scores['recall']['1'])} %"
        if baseline != shown:
            before = found[name, pairs, direction, baseline]["recall"]["1"]
            value = f"<small>{percent(before)} →</small> {value}"
        chance = f"{shown}; chance {percent(scores['chance']['1'])} %"
        cards.append((f"{name}, {direction}, R@1", value, chance))
    return cards[:_BARS]


def _bars(results: Mapping[str, Any]) -> str:
    rows = results["caption_retrieval"]
    if not rows:
        return ""
    keys = list(dict.fromkeys((row["set"], row["direction"]) for row in rows))[:_BARS]
    models = list(results["setup"]["models"])
    found = {(row["set"], row["direction"], row["encoder"]): row["scores"] for row in rows}
    several = len({name for name, _ in keys}) > 1
    labels = [f"{name}\n{direction}" if several else direction for name, direction in keys]
    series = {model: [found[(*key, model)]["recall"]["1"] for key in keys] for model in models}
    chance = [found[(*key, models[0])]["chance"]["1"] for key in keys]
    picture = recall_bars(labels, series, chance, "Caption retrieval R@1 by encoder")
    return html.chart(picture, "Caption retrieval R@1, in %.")


def _samples(samples: Mapping[str, Sequence[QuerySample]], model: str) -> str:
    if not any(samples.values()):
        return ""
    parts = [
        f"<h3>{escape(heading)}</h3>{''.join(map(html.query, queries))}"
        for heading, queries in samples.items()
    ]
    note = f"<p>Hits and misses of {escape(model)}: its best answers, the right one framed in green.</p>"
    return note + "".join(parts)


def _setup(results: Mapping[str, Any]) -> str:
    setup = results["setup"]
    lines = {
        f"encoder {label}": ", ".join(
            f"{name.replace('_', ' ')}: {value}" for name, value in about.items() if value not in ("", None)
        )
        for label, about in setup["models"].items()
    }
    lines |= {"compared with": setup["baseline"]}
    lines |= {f"version of {name}": value for name, value in setup["versions"].items()}
    lines["time"] = format_seconds(setup["seconds"])
    return html.definitions(lines) + html.details("Settings of this evaluation", setup["settings"])


def _data(data: Mapping[str, Any]) -> str:
    parts = []
    for name, about in data.items():
        lines = {"images": str(about["images"])}
        if about["selected"]:
            lines["chosen"] = about["selected"]
        lines |= {pairs: f"{count} pairs" for pairs, count in about["pairs"].items()}
        lines |= {f"left out, {reason}": str(e["images"]) for reason, e in about["left out"].items()}
        lost = [f"{key} ({reason})" for reason, e in about["left out"].items() for key in e["first"]]
        parts.append(
            f"<h3>{escape(name)}</h3>{html.definitions(lines)}{html.details('Images left out', lost)}"
            + html.attribution(about["credit"])
        )
    return "".join(parts)
