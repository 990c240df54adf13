"""Captions to retrieve captions with, read from the files that data sets are published in."""

from __future__ import annotations

from pathlib import Path

from llm2clip.data.sources import expand_braces, expand_path
from llm2clip.errors import DataError
from llm2clip.evaluation.captions.base import CaptionData, make_data
from llm2clip.evaluation.captions.json_files import read_json_captions
from llm2clip.evaluation.captions.parallel_text import is_text_file, read_parallel_text
from llm2clip.evaluation.captions.source_captions import read_source
from llm2clip.settings import CaptionRetrievalSettings

__all__ = ["CaptionData", "open_captions"]


def open_captions(name: str, settings: CaptionRetrievalSettings) -> CaptionData:
    """The data set `name` of the settings, its format told by the files themselves.

    Raises:
        DataError: a file is missing, damaged, or of no format known; or fewer than two images can be used.
    """
    path = settings.sets[name]
    if "://" in path:
        raise DataError(f"sets.{name}: {path} is an address; download it and give the file")
    if Path(path).is_file() and path.endswith(".json"):
        return make_data(name, read_json_captions(Path(path), settings.split), settings)
    names = expand_braces(path)
    if all(is_text_file(Path(one)) for one in names):
        return make_data(name, read_parallel_text(expand_path(path), settings.original), settings)
    return make_data(name, read_source(path, settings), settings)
