"""Flickr30k-CN and COCO-CN: Chinese captions of images of Flickr30k and COCO.

Published in three forms, all of which are read:

- lines of text (Flickr30k-CN and -CNA): `1007129816[.jpg][#zhm#0]<tab or blank><caption>`;
- COCO-CN's release: coco-cn_test.txt with an image name (no suffix) per line, and
  imageid.human-written-caption.txt with lines `COCO_val2014_000000043734#0<tab><caption>`;
- Chinese-CLIP's conversion of either: test_texts.jsonl with {"text_id": 1, "text": "...", "image_ids": [7]} and
  test_imgs.tsv with lines `<image id><tab><base64>`.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from pathlib import Path

import numpy as np

from llm2clip.errors import BadSampleError, DataError
from llm2clip.evaluation.datasets.base import (
    CaptionSet,
    Request,
    RetrievalData,
    caption_set,
    field_of,
    find_file,
    find_images,
)
from llm2clip.evaluation.datasets.text_files import read_json_lines, read_lines

_LINE = re.compile(r"(?P<name>[^\s#]+?)(?:\.jpe?g)?(?:#\S*)?(?:\t|\s+)(?P<text>\S.*)")


def open_flickr30k_cn(request: Request) -> RetrievalData:
    """The 1,000 test images of Flickr30k with Chinese captions.

    Raises:
        DataError: a file is missing or has another format.
    """
    split = request.split or "test"
    if (request.root / f"{split}_texts.jsonl").is_file():
        return _converted(request, split, "flickr30k-cn", "Flickr30k-CN")
    path = find_file(
        request.root,
        f"{split}.txt",
        f"flickr30k_cna_{split}.txt",
        f"{split}/flickr30k_cna_{split}.txt",
        f"flickr30k-cn/{split}.txt",
    )
    folders = ("flickr30k-images", "flickr30k_images", "images")
    captions = _caption_lines(path)
    images = find_images(request, folders, [f"{name}.jpg" for name in captions])
    return RetrievalData(
        "flickr30k-cn",
        "Flickr30k-CN",
        images,
        [caption_set("captions", list(captions.values()), request.per_image)],
    )


def open_coco_cn(request: Request) -> RetrievalData:
    """The 1,000 test images of COCO-CN with their human-written captions.

    Raises:
        DataError: a file is missing or has another format.
    """
    split = request.split or "test"
    if (request.root / f"{split}_texts.jsonl").is_file():
        return _converted(request, split, "coco-cn", "COCO-CN")
    places = ("", "coco-cn-version1805v1.1/")
    listed = find_file(request.root, *(f"{place}coco-cn_{split}.txt" for place in places))
    written = find_file(request.root, *(f"{place}imageid.human-written-caption.txt" for place in places))
    names = [line for _, line in read_lines(listed)]
    captions = _caption_lines(written)
    if lost := [name for name in names if name not in captions]:
        raise DataError(
            f"{written} has no caption for {len(lost)} of {len(names)} images of {listed.name}: "
            f"{', '.join(lost[:10])}"
        )
    files = [
        f"{name.split('_')[1]}/{name}.jpg" if name.startswith("COCO_") else f"{name}.jpg" for name in names
    ]
    images = find_images(request, ("images",), files)
    sets = [caption_set("captions", [captions[name] for name in names], request.per_image)]
    return RetrievalData("coco-cn", "COCO-CN", images, sets)


def _caption_lines(path: Path) -> dict[str, list[str]]:
    """Image name without suffix -> its captions, in the order of the file."""
    captions: dict[str, list[str]] = {}
    for number, line in read_lines(path):
        found = _LINE.fullmatch(line)
        if found is None:
            raise DataError(
                f"{path}:{number}: expected `<image>[#<mark>]`, a tab or blank and a caption, got {line[:60]!r}"
            )
        captions.setdefault(found["name"], []).append(found["text"])
    if not captions:
        raise DataError(f"{path} has no captions")
    return captions


class TsvImages:
    """Images in base64, one per line behind an id and a tab; only the places of the lines are in memory.

    Raises:
        DataError: a line has no tab.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.ids: list[str] = []
        self._places: list[tuple[int, int]] = []
        position = 0
        with open(path, "rb") as handle:
            for number, line in enumerate(handle, 1):
                name, tab, _ = line.partition(b"\t")
                if line.strip() and not tab:
                    raise DataError(f"{path}:{number}: expected `<image id><tab><base64>`, found no tab")
                if tab:
                    self.ids.append(name.decode("ascii", "replace").strip())
                    self._places.append((position + len(name) + 1, len(line) - len(name) - 1))
                position += len(line)

    def __len__(self) -> int:
        return len(self.ids)

    def key(self, row: int) -> str:
        return self.ids[row]

    def read(self, row: int) -> bytes:
        start, size = self._places[row]
        with open(self.path, "rb") as handle:
            handle.seek(start)
            data = handle.read(size).strip()
        # written by more than one tool, some of which took the alphabet of addresses
        try:
            return base64.b64decode(data.translate(bytes.maketrans(b"-_", b"+/")), validate=True)
        except binascii.Error as error:
            raise BadSampleError(self.ids[row], f"its image in {self.path} is not base64 ({error})") from None

    def identity(self) -> str:
        text = "\n".join([str(self.path.stat().st_size), *self.ids])
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def missing(self) -> list[str]:
        return []


def _converted(request: Request, split: str, name: str, title: str) -> RetrievalData:
    images = TsvImages(find_file(request.root, f"{split}_imgs.tsv"))
    rows = {key: row for row, key in enumerate(images.ids)}
    texts: list[str] = []
    owner: list[int] = []
    for where, record in read_json_lines(request.root / f"{split}_texts.jsonl"):
        text = field_of(record, "text", str, where).strip()
        own = [str(key) for key in field_of(record, "image_ids", list, where)]
        if lost := [key for key in own if key not in rows]:
            raise DataError(f"{where}: no image {', '.join(lost[:10])} in {images.path.name}")
        if len(own) != 1:
            raise DataError(f"{where}: expected one image for each text, got {len(own)}")
        if text:
            texts.append(text)
            owner.append(rows[own[0]])
    return RetrievalData(name, title, images, [CaptionSet("captions", texts, np.array(owner, np.int64))])
