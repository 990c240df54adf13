"""Retrieval benchmarks in the file formats that they are published in; one small reader each."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from llm2clip.errors import ConfigError
from llm2clip.evaluation.datasets.base import CaptionSet, ImageReader, Request, RetrievalData
from llm2clip.evaluation.datasets.chinese import open_coco_cn, open_flickr30k_cn
from llm2clip.evaluation.datasets.dci import open_dci
from llm2clip.evaluation.datasets.docci import open_docci
from llm2clip.evaluation.datasets.karpathy import open_coco, open_flickr30k
from llm2clip.evaluation.datasets.sharegpt4v import open_sharegpt4v
from llm2clip.evaluation.datasets.sources import open_openstax, open_own, open_strangers
from llm2clip.evaluation.datasets.urban1k import open_urban1k
from llm2clip.evaluation.datasets.xm3600 import open_xm3600

READERS: dict[str, Callable[[Request], RetrievalData]] = {
    "flickr30k": open_flickr30k,
    "coco": open_coco,
    "sharegpt4v": open_sharegpt4v,
    "urban1k": open_urban1k,
    "docci": open_docci,
    "dci": open_dci,
    "flickr30k-cn": open_flickr30k_cn,
    "coco-cn": open_coco_cn,
    "xm3600": open_xm3600,
    "openstax": open_openstax,
}


def open_dataset(name: str, request: Request) -> RetrievalData:
    """Read the captions of a data set and find its images; no image is read.

    Raises:
        ConfigError: the name is unknown.
        DataError: a file is missing or has another format than published.
    """
    if name not in READERS:
        near = difflib.get_close_matches(name, READERS, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}?" if near else ""
        raise ConfigError(
            f"datasets: unknown data set {name!r}; {hint or 'known: ' + ', '.join(READERS)} "
            "Data of your own goes into data.val."
        )
    return READERS[name](request)


__all__ = [
    "READERS",
    "CaptionSet",
    "ImageReader",
    "Request",
    "RetrievalData",
    "open_dataset",
    "open_own",
    "open_strangers",
]
