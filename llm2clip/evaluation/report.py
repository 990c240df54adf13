"""report.html of `llm2clip evaluate`: what the two stages gained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from llm2clip.evaluation import html
from llm2clip.evaluation.figures import heat_map, recall_bars, training_curves
from llm2clip.evaluation.samples import ReportSamples
from llm2clip.evaluation.tables import percent, result_tables
from llm2clip.files import write_text
from llm2clip.progress import format_seconds
from llm2clip.training.metrics import read_metrics

_RESULTS = ("fine-tuned LLM", "LLM2CLIP")


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
        ("Data, licence and attribution", html.attribution(attribution or {})),
    ]
    write_text(path, html.page(title, _lead(results), _cards(results), sections))


def _lead(results: dict[str, Any]) -> str:
    setup = results["setup"]
    text = f"{setup['items']} held-out items, one per group"
    if setup["bad_samples"]:
        text += f"; {setup['bad_samples']} unreadable samples left out"
    return f"{text}. Beside every figure stands what guessing would give."


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
    return html.card_row(cards)


def _tables(results: dict[str, Any]) -> str:
    tables = "".join(html.table(table, _RESULTS) for table in result_tables(results))
    return f'{_caption_bars(results)}{tables}<p class="note">{html.BOOTSTRAP_NOTE}</p>'


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
    return html.chart(picture, "Caption retrieval R@1 before and after the LLM stage, in %.")


def _samples(samples: ReportSamples | None) -> str:
    if samples is None:
        return ""
    parts = []
    for kind, queries in samples.text_to_image.items():
        parts.append(f"<h3>Text → image, {escape(kind)} captions</h3>" + "".join(map(html.query, queries)))
    for kind, queries in samples.image_to_text.items():
        parts.append(f"<h3>Image → text, {escape(kind)} captions</h3>" + "".join(map(html.query, queries)))
    note = "<p>The best answers from left to right or top to bottom; the right one is framed in green.</p>"
    return note + "".join(parts) if parts else ""


def _heat(samples: ReportSamples | None) -> str:
    if samples is None or not samples.heat:
        return ""
    charts = []
    for kind, values in samples.heat.items():
        picture = heat_map(values, kind)
        charts.append(html.chart(picture, picture.description + "."))
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
        parts.append(f"<h3>{escape(name)}</h3>{html.chart(picture, note + '.')}")
    return "".join(parts)


def _setup(setup: dict[str, Any]) -> str:
    lines = {f"time, {name}": format_seconds(seconds) for name, seconds in setup["seconds"].items()}
    lines |= {name.replace("_", " "): str(value) for name, value in (setup["model"] or {}).items()}
    lines |= {f"version of {name}": value for name, value in setup["versions"].items()}
    return (
        html.definitions(lines)
        + html.details("Settings of this evaluation", setup["settings"])
        + html.details("Samples that could not be read", setup["bad_examples"])
    )
