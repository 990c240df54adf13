"""report.html: one file that opens anywhere, without a network, without scripts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from llm2clip.evaluation.figures import Picture, data_uri, heat_map, recall_bars, training_curves
from llm2clip.evaluation.samples import Answer, QuerySample, ReportSamples
from llm2clip.evaluation.style import STYLE
from llm2clip.evaluation.tables import Table, blank_repeats, percent, result_tables
from llm2clip.files import write_text
from llm2clip.progress import format_seconds
from llm2clip.training.metrics import read_metrics

MAX_CAPTION = 320  # characters of a caption shown


def write_report(
    path: Path,
    *,
    title: str,
    results: dict[str, Any],
    metrics: Mapping[str, Path],
    samples: ReportSamples | None = None,
    attribution: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Write the report atomically.

    Args:
        path: the HTML file.
        title: heading.
        results: what `evaluate` returns.
        metrics: name of a stage -> its metrics.jsonl; missing files are left out.
        samples: sample queries and similarity blocks, where images were evaluated.
        attribution: licence and credit entries of the data.
    """
    sections = [
        ("Results", _tables(results)),
        ("Sample queries", _samples(samples)),
        ("Similarity", _heat(samples)),
        ("Training", _curves(metrics)),
        ("Setup", _setup(results["setup"])),
        ("Data, licence and attribution", _attribution(attribution or {})),
    ]
    kept = [(name, _identifier(name), body) for name, body in sections if body]
    links = "".join(f'<a href="#{identifier}">{escape(name)}</a>' for name, identifier, _ in kept)
    body = "".join(
        f'<section id="{identifier}"><h2>{escape(name)}</h2>{content}</section>'
        for name, identifier, content in kept
    )
    write_text(
        path,
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>"
        f"<header><h1>{escape(title)}</h1>{_lead(results)}<nav>{links}</nav></header>"
        f"<main>{_cards(results)}{body}</main></body></html>\n",
    )


def _identifier(name: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def _lead(results: dict[str, Any]) -> str:
    setup = results["setup"]
    text = f"{setup['items']} held-out items, one per group"
    if setup["bad_samples"]:
        text += f"; {setup['bad_samples']} unreadable samples left out"
    return f"<p>{escape(text)}. Beside every figure stands what guessing would give.</p>"


def _cards(results: dict[str, Any]) -> str:
    """The few figures that say whether it worked."""
    cards = []
    captions = [row for row in results["caption_retrieval"] if row["pairs"] == "short ↔ long"]
    for direction in dict.fromkeys(row["direction"] for row in captions):
        rows = [row for row in captions if row["direction"] == direction]
        before = [row for row in rows if row["stage"] == "base"]
        shown = next((row for row in rows if row["stage"] == "tuned"), rows[-1])
        value = f"{percent(shown['scores']['recall']['1'])} %"
        if before and shown["stage"] == "tuned":
            value = f"<small>{percent(before[-1]['scores']['recall']['1'])} →</small> {value}"
        cards.append((f"CRA, {direction}, R@1", value, f"chance {percent(shown['scores']['chance']['1'])} %"))
    for row in results["retrieval"]:
        if row["queries"] in ("short", "long"):
            recall, chance = row["scores"]["recall"]["10"], row["scores"]["chance"]["10"]
            name = f"{row['direction']}, {row['queries']} captions, R@10"
            cards.append(
                (name, f"{percent(recall)} %", f"{recall / chance:.1f}× chance ({percent(chance)} %)")
            )
    inner = "".join(
        f'<div class="card"><span>{escape(name)}</span><b>{value}</b><span>{escape(note)}</span></div>'
        for name, value, note in cards
    )
    return f'<div class="cards">{inner}</div>'


def _tables(results: dict[str, Any]) -> str:
    return (
        _caption_bars(results)
        + "".join(_table(table) for table in result_tables(results))
        + (
            '<p class="note">Small figures: 95 % interval (bootstrap over queries). R@k: share of queries '
            "with a right answer among the first k. Ties are broken at random, in expectation, so embeddings "
            "that tell nothing apart score chance.</p>"
        )
    )


def _caption_bars(results: dict[str, Any]) -> str:
    rows = results["caption_retrieval"]
    directions = list(dict.fromkeys(row["direction"] for row in rows))[:8]
    if not rows:
        return ""
    by_encoder: dict[str, dict[str, float]] = {}
    chance: dict[str, float] = {}
    for row in rows:
        by_encoder.setdefault(row["encoder"], {})[row["direction"]] = row["scores"]["recall"]["1"]
        chance[row["direction"]] = row["scores"]["chance"]["1"]
    series = {name: [values.get(d, 0.0) for d in directions] for name, values in by_encoder.items()}
    picture = recall_bars(
        directions,
        series,
        [chance[d] for d in directions],
        "Caption retrieval R@1 before and after the LLM stage",
    )
    return _picture(picture, "Caption retrieval R@1 before and after the LLM stage, in %.")


def _table(table: Table) -> str:
    head = "".join(
        f'<th scope="col"{"" if column < table.labels else _NUMBER}>{escape(name)}</th>'
        for column, name in enumerate(table.header)
    )
    lines = []
    for row, shown, small in zip(table.rows, blank_repeats(table), table.small, strict=True):
        kind = "chance" if row[table.labels - 1] == "chance" else "best" if _is_result(row, table) else ""
        cells = "".join(
            f"<td{'' if column < table.labels else _NUMBER}>{escape(cell)}"
            + (f"<small>{escape(small[column])}</small>" if small[column] else "")
            + "</td>"
            for column, cell in enumerate(shown)
        )
        lines.append(f'<tr class="{kind}">{cells}</tr>')
    return (
        f"<h3>{escape(table.title)}</h3><p>{escape(table.note)}</p>"
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


_NUMBER = ' class="number"'


def _is_result(row: Sequence[str], table: Table) -> bool:
    return row[table.labels - 1] in ("fine-tuned LLM", "LLM2CLIP")


def _samples(samples: ReportSamples | None) -> str:
    if samples is None:
        return ""
    parts = []
    for kind, queries in samples.text_to_image.items():
        parts.append(f"<h3>Text → image, {escape(kind)} captions</h3>" + "".join(map(_query, queries)))
    for kind, queries in samples.image_to_text.items():
        parts.append(f"<h3>Image → text, {escape(kind)} captions</h3>" + "".join(map(_query, queries)))
    note = "<p>The best answers from left to right or top to bottom; the right one is framed in green.</p>"
    return note + "".join(parts) if parts else ""


def _query(query: QuerySample) -> str:
    hit = query.rank == 1
    badge = f'<span class="badge {"hit" if hit else "miss"}">{"hit" if hit else f"rank {query.rank}"}</span>'
    asked = f"<blockquote>{escape(_shorten(query.text))}</blockquote>" if query.picture is None else ""
    picture = _image(query.picture, "query image") if query.picture is not None else ""
    answers = "".join(_answer(answer, place) for place, answer in enumerate(query.answers))
    listing = (
        f'<div class="row">{answers}</div>' if query.picture is None else f'<ul class="texts">{answers}</ul>'
    )
    place = f'<span class="place">of {query.gallery}</span>'
    return (
        f'<article class="query"><div class="asked">{badge}{place}{asked}{picture}</div>{listing}</article>'
    )


def _answer(answer: Answer, place: int) -> str:
    right = "right" if answer.right else ""
    label = f"#{answer.place} · {answer.similarity:.2f}"
    if answer.picture is None:
        return f'<li class="{right}"><span>{label}</span> {escape(_shorten(answer.text))}</li>'
    # the right answer of a miss stands apart from the best ones
    apart = " far" if answer.place > place + 1 else ""
    picture = _image(answer.picture, f"answer {answer.place}")
    return f'<figure class="{right}{apart}">{picture}<figcaption>{label}</figcaption></figure>'


def _shorten(text: str) -> str:
    return text if len(text) <= MAX_CAPTION else text[: MAX_CAPTION - 1].rstrip() + "…"


def _image(data: bytes | None, description: str) -> str:
    return f'<img src="{data_uri(data)}" alt="{escape(description)}" loading="lazy">' if data else ""


def _picture(picture: Picture, caption: str) -> str:
    return (
        f'<figure class="chart"><picture><source media="(prefers-color-scheme: dark)" '
        f'srcset="{picture.dark}">'
        f'<img src="{picture.light}" alt="{escape(picture.description)}"></picture>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _heat(samples: ReportSamples | None) -> str:
    if samples is None or not samples.heat:
        return ""
    charts = []
    for kind, values in samples.heat.items():
        picture = heat_map(values, kind)
        charts.append(_picture(picture, picture.description + "."))
    return (
        "<p>Cosine similarity of the first held-out texts (rows) and images (columns); right pairs lie on "
        f'the diagonal.</p><div class="pair">{"".join(charts)}</div>'
    )


def _curves(metrics: Mapping[str, Path]) -> str:
    parts = []
    for name, path in metrics.items():
        lines = read_metrics(path) if path.is_file() else []
        picture = training_curves(name, lines)
        if picture is None:
            continue
        rates = [line["samples_per_second"] for line in lines if line.get("samples_per_second")]
        note = picture.description + (
            f"; {sorted(rates)[len(rates) // 2]:.0f} samples/s (median)" if rates else ""
        )
        parts.append(f"<h3>{escape(name)}</h3>{_picture(picture, note + '.')}")
    return "".join(parts)


def _setup(setup: dict[str, Any]) -> str:
    lines = {f"time, {name}": format_seconds(seconds) for name, seconds in setup["seconds"].items()}
    lines |= {name.replace("_", " "): str(value) for name, value in (setup["model"] or {}).items()}
    lines |= {f"version of {name}": value for name, value in setup["versions"].items()}
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in lines.items())
    settings = escape(json.dumps(setup["settings"], indent=2, ensure_ascii=False))
    bad = "".join(f"<li>{escape(text)}</li>" for text in setup["bad_examples"])
    skipped = (
        f"<details><summary>Samples that could not be read</summary><ul>{bad}</ul></details>" if bad else ""
    )
    return (
        f"<dl>{rows}</dl>"
        f"<details><summary>Settings of this evaluation</summary><pre>{settings}</pre></details>"
        f"{skipped}"
    )


def _attribution(attribution: Mapping[str, Sequence[str]]) -> str:
    if not attribution:
        return "<p>The data carries no licence or attribution of its own.</p>"
    rows = "".join(
        f"<dt>{escape(name)}</dt><dd>{'<br>'.join(escape(value) for value in values)}</dd>"
        for name, values in attribution.items()
    )
    return f"<p>Pictures and captions above belong to their authors.</p><dl>{rows}</dl>"
