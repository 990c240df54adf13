"""Urban-1k: 1,000 busy street scenes with one long caption each (Long-CLIP, arXiv 2403.15378).

Format: `image/221.jpg` and `caption/221.txt`, a pair for every number; the caption is the file's first line.
"""

from __future__ import annotations

from pathlib import Path

from llm2clip.errors import DataError
from llm2clip.evaluation.datasets.base import Request, RetrievalData, caption_set, find_images
from llm2clip.evaluation.datasets.text_files import read_lines


def open_urban1k(request: Request) -> RetrievalData:
    """All pairs, by number.

    Raises:
        DataError: a file is missing or has another format.
    """
    if request.split not in ("", "test"):
        raise DataError(f"urban1k has no split {request.split!r}; all of it is `test`")
    folder = next(
        (
            place
            for place in (request.root / "caption", request.root / "Urban1k" / "caption")
            if place.is_dir()
        ),
        None,
    )
    files = sorted(folder.glob("*.txt"), key=_number) if folder is not None else []
    if not files:
        raise DataError(f"{request.root} lacks caption/<number>.txt, the captions of Urban-1k")
    captions = []
    for file in files:
        first = next(read_lines(file), None)
        if first is None:
            raise DataError(f"{file} is empty; expected the caption of the image of the same name")
        captions.append([first[1]])
    images = find_images(
        request, ("image", "images", "Urban1k/image"), [f"{file.stem}.jpg" for file in files]
    )
    return RetrievalData("urban1k", "Urban-1k", images, [caption_set("captions", captions)])


def _number(file: Path) -> tuple[int, str]:
    return (int(file.stem) if file.stem.isdigit() else 0), file.stem
