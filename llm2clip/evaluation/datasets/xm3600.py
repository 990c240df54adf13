"""Crossmodal-3600: 3,600 images with captions written in 36 languages (arXiv 2205.12522).

Format: captions.jsonl with one object per image, {"image/key": "000411001ff7dd4f", "image/locale": "en", "en":
{"caption": ["...", "..."], "caption/tokenized": [...], ...}, "fr": {...}, ...}, and `images/<key>.jpg`. Every language
is a set of captions of its own; all captions of an image count.
"""

from __future__ import annotations

from llm2clip.errors import DataError
from llm2clip.evaluation.datasets.base import (
    Request,
    RetrievalData,
    caption_set,
    field_of,
    find_file,
    find_images,
)
from llm2clip.evaluation.datasets.text_files import read_json_lines


def open_xm3600(request: Request) -> RetrievalData:
    """All images, with one set of captions per language found; `request.split` names languages (`en,de`).

    Raises:
        DataError: a file is missing or has another format, or a language is not there.
    """
    path = find_file(request.root, "captions.jsonl", "xm3600/captions.jsonl")
    files: list[str] = []
    captions: dict[str, list[list[str]]] = {}
    for where, record in read_json_lines(path):
        files.append(f"{field_of(record, 'image/key', str, where)}.jpg")
        for language, entry in record.items():
            if isinstance(entry, dict):
                own = captions.setdefault(language, [])
                own += [[]] * (len(files) - 1 - len(own))  # images before without this language
                own.append(field_of(entry, "caption", list, f"{where}, {language}"))
    wanted = [name for name in request.split.split(",") if name] or sorted(captions)
    if unknown := [name for name in wanted if name not in captions]:
        raise DataError(
            f"{path} has no captions in {', '.join(unknown)}; languages found: {', '.join(sorted(captions))}"
        )
    images = find_images(request, ("images",), files)
    sets = [caption_set(language, captions[language], request.per_image) for language in wanted]
    return RetrievalData("xm3600", "XM3600", images, sets)
