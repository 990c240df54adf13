"""Figures of OpenStax books: captions, credits and descriptions from CNXML modules."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from llm2clip.errors import BadSampleError

_NS = "{http://cnx.rice.edu/cnxml}"
# how a credit begins in the English, Spanish and Polish editions
_CREDIT = re.compile(
    r"\(\s*(?:(?:photo|image|figure|work)?\s*credits?|attribution|modification of work|cr[eé]ditos?|fuente|"
    r"źródło|źr[oó]dła|autor|zdjęcie|oprac)\b",
    re.IGNORECASE,
)
# an entity declaration can make a small file grow without bound
_DOCTYPE = re.compile(rb"<!(?:DOCTYPE|ENTITY)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Figure:
    """One image of a book with the texts that belong to it.

    Attributes:
        source: path of the image inside the repository (`media/name.jpg`).
        caption: printed caption without its credits.
        alt: description written for readers who cannot see the image.
        short: title of the figure, mostly empty.
        credit: who made the image, as printed.
    """

    source: str
    caption: str
    alt: str
    short: str
    credit: str


def parse_module(data: bytes, name: str) -> list[Figure]:
    """Figures of one module (`modules/<id>/index.cnxml`), in order.

    Raises:
        BadSampleError: the file is not well-formed XML, or declares entities.
    """
    if _DOCTYPE.search(data):
        raise BadSampleError(name, "it declares a document type or entities, which are not read")
    try:
        root = ElementTree.fromstring(data)
    except ElementTree.ParseError as error:
        raise BadSampleError(name, f"it is not well-formed XML ({error})") from None
    return list(_figures(root, "", ""))


def _figures(element: ElementTree.Element, caption: str, title: str) -> Iterator[Figure]:
    for child in element:
        if child.tag in (_NS + "figure", _NS + "subfigure"):
            # a part of a figure keeps its own caption where it has one
            yield from _figures(child, _text(child.find(_NS + "caption")) or caption,
                                _text(child.find(_NS + "title")) or title)  # fmt: skip
        elif child.tag == _NS + "media" and element.tag in (_NS + "figure", _NS + "subfigure"):
            image = child.find(_NS + "image")
            source = image.get("src", "") if image is not None else ""
            # modules lie two folders below the root: ../../media/x.jpg
            path = posixpath.normpath(posixpath.join("modules/m", source))
            if source and path.startswith("media/"):
                text, credit = split_credit(caption)
                yield Figure(path, text, " ".join(child.get("alt", "").split()), title, credit)
        elif child.tag != _NS + "caption":
            yield from _figures(child, caption, title)


def _text(element: ElementTree.Element | None) -> str:
    return " ".join("".join(element.itertext()).split()) if element is not None else ""


def split_credit(caption: str) -> tuple[str, str]:
    """Separate the credits in brackets from a caption: (caption, credits joined with `; `)."""
    credits: list[str] = []
    while found := _CREDIT.search(caption):
        depth = 0
        end = len(caption)
        for position in range(found.start(), len(caption)):
            depth += (caption[position] == "(") - (caption[position] == ")")
            if depth == 0:
                end = position + 1
                break
        credits.append(caption[found.start() + 1 : end].removesuffix(")").strip())
        caption = caption[: found.start()] + caption[end:]
    caption = re.sub(r"\s+([.,;])", r"\1", " ".join(caption.split()))
    return caption, "; ".join(credits)


def read_book(root: Path) -> tuple[list[Figure], list[str]]:
    """All figures of a checked-out book, each image once, and what could not be read.

    A later use of the same image only fills texts that the first lacks.
    """
    figures: dict[str, Figure] = {}
    problems: list[str] = []
    for path in sorted((root / "modules").glob("*/index.cnxml")):
        try:
            found = parse_module(path.read_bytes(), path.parent.name)
        except BadSampleError as error:
            problems.append(str(error))
            continue
        for figure in found:
            known = figures.get(figure.source)
            figures[figure.source] = figure if known is None else Figure(
                known.source, known.caption or figure.caption, known.alt or figure.alt,
                known.short or figure.short, known.credit or figure.credit,
            )  # fmt: skip
    return list(figures.values()), problems
