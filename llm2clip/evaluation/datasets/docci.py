"""DOCCI: images with long human-written descriptions (arXiv 2404.19753).

Format: docci_descriptions.jsonlines with {"example_id": "test_00000", "split": "test", "image_file":
"test_00000.jpg", "description": "..."} and the images in `images/`. The test split has 5,000 pairs.
"""

from __future__ import annotations

from llm2clip.evaluation.datasets.base import (
    Request,
    RetrievalData,
    caption_set,
    field_of,
    find_file,
    find_images,
    require_split,
)
from llm2clip.evaluation.datasets.text_files import read_json_lines


def open_docci(request: Request) -> RetrievalData:
    """The pairs of one split (test, qual_test, qual_dev, train).

    Raises:
        DataError: a file is missing or has another format.
    """
    path = find_file(request.root, "docci_descriptions.jsonlines")
    split = request.split or "test"
    splits: set[str] = set()
    files: list[str] = []
    captions: list[list[str]] = []
    for where, record in read_json_lines(path):
        splits.add(field_of(record, "split", str, where))
        if record["split"] == split:
            files.append(field_of(record, "image_file", str, where))
            captions.append([field_of(record, "description", str, where)])
    require_split(split, sorted(splits), path)
    images = find_images(request, ("images", "test_images"), files)
    return RetrievalData("docci", "DOCCI", images, [caption_set("captions", captions)])
