"""Plain text as a source: .txt files with one text per line, blank lines left out (wikitext style)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llm2clip.data.tabular import JsonlSource
from llm2clip.errors import BadSampleError

TEXT_FIELD = "text"


class TextSource(JsonlSource):
    """Lines of .txt files, each a sample with one caption field, `text`.

    Only the offsets of the lines are in memory; the lines are read when they are asked for.
    """

    def __init__(self, paths: Sequence[Path], *, name: str, limit: int | None = None) -> None:
        super().__init__(paths, name=name, limit=limit)

    def _parse(self, key: str, line: bytes) -> Mapping[str, Any]:
        try:
            return {TEXT_FIELD: line.decode("utf-8").strip()}
        except UnicodeDecodeError as error:
            raise BadSampleError(key, f"it is not UTF-8 text ({error})") from None
