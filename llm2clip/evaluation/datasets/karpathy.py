"""Flickr30k and COCO in Karpathy and Fei-Fei's split files, dataset_flickr30k.json and dataset_coco.json.

Format: {"images": [{"filepath": "val2014", "filename": "COCO_val2014_000000391895.jpg", "split": "test",
"sentences": [{"raw": "A man with ..."}, ...]}, ...]}; `filepath` is COCO's alone. The test splits have 1,000 and
5,000 images; papers keep the first five captions of each (Karpathy and Fei-Fei, CVPR 2015).
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

_FOLDERS = ("", "karpathy/", "annotations/", "caption_datasets/")


def open_flickr30k(request: Request) -> RetrievalData:
    """Flickr30k; images in `flickr30k-images/`, `flickr30k_images/` or `images/`.

    Raises:
        DataError: a file is missing or has another format.
    """
    folders = ("flickr30k-images", "flickr30k_images", "images", "Images")
    return _open(request, "flickr30k", "Flickr30k", "dataset_flickr30k.json", folders)


def open_coco(request: Request) -> RetrievalData:
    """COCO captions of 2014; images in `val2014/` and `train2014/`, directly or below `images/`.

    Raises:
        DataError: a file is missing or has another format.
    """
    return _open(request, "coco", "COCO", "dataset_coco.json", ("images",))


def _open(request: Request, name: str, title: str, file: str, folders: tuple[str, ...]) -> RetrievalData:
    path = find_file(request.root, *(folder + file for folder in _FOLDERS))
    entries = field_of(read_json(path, DataError), "images", list, path)
    split = request.split or "test"
    splits: set[str] = set()
    files: list[str] = []
    captions: list[list[str]] = []
    for number, entry in enumerate(entries):
        where = f"{path}, image {number}"
        splits.add(field_of(entry, "split", str, where))
        if entry["split"] != split:
            continue
        image = field_of(entry, "filename", str, where)
        files.append(f"{entry['filepath']}/{image}" if entry.get("filepath") else image)
        sentences = field_of(entry, "sentences", list, where)
        captions.append([field_of(sentence, "raw", str, where) for sentence in sentences])
    require_split(split, sorted(splits), path)
    return RetrievalData(
        name,
        title,
        find_images(request, folders, files),
        [caption_set("captions", captions, request.per_image or 5)],
    )
