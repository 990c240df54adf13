"""Parts of a report page: frame, tables, sample queries, charts. One file without scripts or addresses."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from html import escape
from typing import Any

from llm2clip.evaluation.figures import Picture, data_uri
from llm2clip.evaluation.samples import Answer, QuerySample
from llm2clip.evaluation.style import STYLE
from llm2clip.evaluation.tables import Table, blank_repeats

MAX_CAPTION = 320  # characters of a caption shown
_NUMBER = ' class="number"'
BOOTSTRAP_NOTE = (
    "Small figures: 95 % interval (bootstrap over queries). R@k: share of queries with a right answer among the first "
    "k. Ties are broken at random, in expectation, so embeddings that tell nothing apart score chance."
)


def page(title: str, lead: str, cards: str, sections: Sequence[tuple[str, str]]) -> str:
    """A whole page.

    Args:
        title: heading, plain text.
        lead: one or two sentences below it, plain text.
        cards: `card_row`, or "".
        sections: (heading, HTML); empty ones are left out.
    """
    kept = [(name, _identifier(name), body) for name, body in sections if body]
    links = "".join(f'<a href="#{identifier}">{escape(name)}</a>' for name, identifier, _ in kept)
    body = "".join(
        f'<section id="{identifier}"><h2>{escape(name)}</h2>{content}</section>'
        for name, identifier, content in kept
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>"
        f"<header><h1>{escape(title)}</h1><p>{escape(lead)}</p><nav>{links}</nav></header>"
        f"<main>{cards}{body}</main></body></html>\n"
    )


def _identifier(name: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def card_row(cards: Sequence[tuple[str, str, str]]) -> str:
    """Headline figures: (what, value as HTML, remark)."""
    inner = "".join(
        f'<div class="card"><span>{escape(name)}</span><b>{value}</b><span>{escape(note)}</span></div>'
        for name, value, note in cards
    )
    return f'<div class="cards">{inner}</div>'


def table(content: Table, results: Collection[str] = ()) -> str:
    """A table under its title; rows whose last label is `chance` are muted, those in `results` stand out."""
    head = "".join(
        f'<th scope="col"{"" if column < content.labels else _NUMBER}>{escape(name)}</th>'
        for column, name in enumerate(content.header)
    )
    spanning = ""
    if content.groups:
        before = len(content.header) - sum(count for _, count in content.groups)
        cells = "".join(
            f'<th colspan="{count}" scope="colgroup" class="group">{escape(name)}</th>'
            for name, count in content.groups
        )
        spanning = f'<tr><td colspan="{before}"></td>{cells}</tr>'
    lines = []
    blank = [[""] * len(content.header)] * len(content.rows)
    for number, (row, shown, small) in enumerate(
        zip(content.rows, blank_repeats(content), content.small or blank, strict=True)
    ):
        name = row[content.labels - 1]
        kind = "chance" if name == "chance" else "best" if name in results else ""
        cells = "".join(
            f"<td{'' if column < content.labels else _NUMBER}>"
            + (f"<b>{escape(cell)}</b>" if (number, column) in content.strong else escape(cell))
            + (f"<small>{escape(small[column])}</small>" if small[column] else "")
            + "</td>"
            for column, cell in enumerate(shown)
        )
        lines.append(f'<tr class="{kind}">{cells}</tr>')
    return (
        f"<h3>{escape(content.title)}</h3><p>{escape(content.note)}</p>"
        f'<div class="scroll"><table><thead>{spanning}<tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def query(sample: QuerySample) -> str:
    """One query with its best answers."""
    hit = sample.rank == 1
    badge = f'<span class="badge {"hit" if hit else "miss"}">{"hit" if hit else f"rank {sample.rank}"}</span>'
    asked = f"<blockquote>{escape(_shorten(sample.text))}</blockquote>" if sample.text else ""
    shown = image(sample.picture, "query image")
    answers = "".join(_answer(answer, place) for place, answer in enumerate(sample.answers))
    pictures = any(answer.picture is not None for answer in sample.answers)
    listing = f'<div class="row">{answers}</div>' if pictures else f'<ul class="texts">{answers}</ul>'
    place = f'<span class="place">of {sample.gallery}</span>'
    return f'<article class="query"><div class="asked">{badge}{place}{asked}{shown}</div>{listing}</article>'


def _answer(answer: Answer, place: int) -> str:
    right = "right" if answer.right else ""
    label = f"#{answer.place} · {answer.similarity:.2f}"
    if answer.picture is None:
        return f'<li class="{right}"><span>{label}</span> {escape(_shorten(answer.text))}</li>'
    # the right answer of a miss stands apart from the best ones
    apart = " far" if answer.place > place + 1 else ""
    shown = image(answer.picture, f"answer {answer.place}")
    return f'<figure class="{right}{apart}">{shown}<figcaption>{label}</figcaption></figure>'


def _shorten(text: str) -> str:
    return text if len(text) <= MAX_CAPTION else text[: MAX_CAPTION - 1].rstrip() + "…"


def image(data: bytes | None, description: str) -> str:
    """An encoded picture inside the page."""
    return f'<img src="{data_uri(data)}" alt="{escape(description)}" loading="lazy">' if data else ""


def chart(picture: Picture, caption: str) -> str:
    """A chart that follows the reader's light or dark setting."""
    return (
        f'<figure class="chart"><picture><source media="(prefers-color-scheme: dark)" '
        f'srcset="{picture.dark}">'
        f'<img src="{picture.light}" alt="{escape(picture.description)}"></picture>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def definitions(lines: Mapping[str, str]) -> str:
    """Names and values."""
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in lines.items())
    return f"<dl>{rows}</dl>"


def details(summary: str, value: Any) -> str:
    """Something long behind a click: a list of lines, or a JSON value."""
    if not value:
        return ""
    if isinstance(value, list):
        body = "<ul>" + "".join(f"<li>{escape(str(line))}</li>" for line in value) + "</ul>"
    else:
        body = f"<pre>{escape(json.dumps(value, indent=2, ensure_ascii=False))}</pre>"
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"


def attribution(entries: Mapping[str, Sequence[str]]) -> str:
    """Licence and credit of the data shown."""
    if not entries:
        return "<p>The data carries no licence or attribution of its own.</p>"
    rows = "".join(
        f"<dt>{escape(name)}</dt><dd>{'<br>'.join(escape(value) for value in values)}</dd>"
        for name, values in entries.items()
    )
    return f"<p>Pictures and captions above belong to their authors.</p><dl>{rows}</dl>"
