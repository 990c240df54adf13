"""ShareGPT4V's long captions: the first 1,000 entries of share-captioner_coco_lcs_sam_1246k_1107.json.

Format: [{"id": "000000000009", "image": "coco/train2017/000000000009.jpg", "conversations": [{"from": "human",
"value": "..."}, {"from": "gpt", "value": "The image ..."}]}, ...]. The first 1,000 are the test set of Long-CLIP
(arXiv 2403.15378, section 4.1), line breaks read as blanks.
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
from llm2clip.evaluation.datasets.text_files import head_of_json_array

FILE = "share-captioner_coco_lcs_sam_1246k_1107.json"
COUNT = 1000


def open_sharegpt4v(request: Request) -> RetrievalData:
    """The first 1,000 image-caption pairs; `image` is a path below the root or below `data/`.

    Raises:
        DataError: a file is missing or has another format.
    """
    if request.split not in ("", "test"):
        raise DataError(f"sharegpt4v has no split {request.split!r}; its first {COUNT} entries are `test`")
    path = find_file(request.root, FILE, f"data/{FILE}")
    files: list[str] = []
    captions: list[list[str]] = []
    for number, entry in enumerate(head_of_json_array(path, COUNT)):
        where = f"{path}, entry {number}"
        files.append(field_of(entry, "image", str, where))
        turns = field_of(entry, "conversations", list, where)
        if len(turns) < 2:
            raise DataError(f"{where}: expected a question and an answer, found {len(turns)} turns")
        captions.append([field_of(turns[1], "value", str, where).replace("\n", " ")])
    if not files:
        raise DataError(f"{path} has no entries")
    images = find_images(request, ("data", "images"), files)
    return RetrievalData("sharegpt4v", "ShareGPT4V", images, [caption_set("captions", captions)])
