"""DCI, Densely Captioned Images: 7,805 images of SA-1B with complete descriptions (arXiv 2312.08578).

Format: splits.json with {"train": ["<file>.json", ...], "valid": [...], "test": [...]}, `annotations/<file>.json`
with {"image": "sa_....jpg", "short_caption": "...", "extra_caption": "...", ...}, and the images in `photos/`, all
directly or below `densely_captioned_images/`. Retrieval papers take all splits, and as the caption the short one
followed by the extra one.
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
    require_split,
)
from llm2clip.files import read_json

_FOLDER = "densely_captioned_images"


def open_dci(request: Request) -> RetrievalData:
    """The pairs of all splits, or of one (train, valid, test).

    Raises:
        DataError: a file is missing or has another format.
    """
    path = find_file(request.root, "splits.json", f"{_FOLDER}/splits.json")
    splits = read_json(path, DataError)
    if not isinstance(splits, dict) or not all(isinstance(names, list) for names in splits.values()):
        raise DataError(f"{path}: expected an object with a list of annotation files for each split")
    if request.split not in ("", "all"):
        require_split(request.split, list(splits), path)
        splits = {request.split: splits[request.split]}
    files: list[str] = []
    captions: list[list[str]] = []
    for name in (name for names in splits.values() for name in names):
        file = path.parent / "annotations" / str(name)
        record = read_json(file, DataError)
        files.append(field_of(record, "image", str, file))
        parts = (field_of(record, "short_caption", str, file), str(record.get("extra_caption") or ""))
        captions.append(["\n".join(part.strip() for part in parts if part.strip())])
    if not files:
        raise DataError(f"{path} names no annotation files")
    images = find_images(request, ("photos", f"{_FOLDER}/photos"), files)
    return RetrievalData("dci", "DCI", images, [caption_set("captions", captions)])
