"""Captions in COCO's annotation files and in Karpathy and Fei-Fei's split files.

COCO: {"images": [{"id": 391895, "file_name": "..."}, ...], "annotations": [{"image_id": 391895, "caption": "..."},
...]}
(captions_val2017.json, captions_val2014.json). Karpathy: {"images": [{"filename": "...", "split": "test", "sentences":
[{"raw": "..."}, ...]}, ...]} (dataset_coco.json, dataset_flickr30k.json). CRA is defined on the first two captions of
the images of COCO's test split of 5,000 (arXiv 2411.04997v6, table A1).
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from llm2clip.errors import DataError
from llm2clip.evaluation.captions.base import Caption, CaptionFile, ImageCaptions
from llm2clip.evaluation.datasets.base import field_of, require_split
from llm2clip.files import read_json


def read_json_captions(path: Path, split: str) -> CaptionFile:
    """The captions of a COCO or Karpathy file.

    Args:
        path: the file.
        split: of a Karpathy file; COCO's have one each.

    Raises:
        DataError: the file is damaged or has another format.
    """
    content = read_json(path, DataError)
    images = field_of(content, "images", list, path)
    if "annotations" in content:
        return CaptionFile(_coco(path, images, field_of(content, "annotations", list, path)))
    return _karpathy(path, images, split)


def _coco(path: Path, images: list[Any], annotations: list[Any]) -> list[ImageCaptions]:
    captions: dict[Any, list[Caption]] = {}
    names: dict[Any, str] = {}
    for number, image in enumerate(images):
        key = field_of(image, "id", (int, str), f"{path}, image {number}")
        if key in names:
            raise DataError(f"{path} has two images with the id {key}")
        names[key], captions[key] = str(image.get("file_name") or key), []
    for number, annotation in enumerate(annotations):
        where = f"{path}, annotation {number}"
        key = field_of(annotation, "image_id", (int, str), where)
        if key not in captions:
            raise DataError(f"{where}: image {key} is not among the images of the file")
        captions[key].append(Caption(field_of(annotation, "caption", str, where).strip()))
    return [ImageCaptions(names[key], tuple(own)) for key, own in captions.items()]


def _karpathy(path: Path, entries: list[Any], split: str) -> CaptionFile:
    found: list[ImageCaptions] = []
    splits: Counter[str] = Counter()
    for number, entry in enumerate(entries):
        where = f"{path}, image {number}"
        splits[field_of(entry, "split", str, where)] += 1
        if entry["split"] != split:
            continue
        sentences = field_of(entry, "sentences", list, where)
        own = tuple(Caption(field_of(sentence, "raw", str, where).strip()) for sentence in sentences)
        found.append(ImageCaptions(str(entry.get("filename") or number), own))
    require_split(split, sorted(splits), path)
    chosen = f"split {split}, {len(found)} of {len(entries)} images" if len(splits) > 1 else ""
    return CaptionFile(found, selected=chosen)
