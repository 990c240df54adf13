"""Reading the text files that data sets are published in, with errors that name the place."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llm2clip.errors import DataError

# of a JSON array read at a time
_CHUNK = 1 << 20
_BLANK = re.compile(r"[\s,]*")


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number from 1, text) of every line that is not blank, UTF-8.

    Raises:
        DataError: the file cannot be read or is not UTF-8.
    """
    try:
        with open(path, encoding="utf-8-sig") as handle:
            for number, line in enumerate(handle, 1):
                if text := line.strip():
                    yield number, text
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error})") from None


def read_json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """(place for messages, value) of every line of a .jsonl file.

    Raises:
        DataError: a line is not JSON.
    """
    for number, line in read_lines(path):
        try:
            yield f"{path}:{number}", json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}:{number} is not JSON ({error}); the file is damaged") from None


def head_of_json_array(path: Path, count: int) -> list[Any]:
    """The first `count` entries of a file that holds one JSON array, without reading the rest.

    Raises:
        DataError: the file is not such an array, or ends before an entry does.
    """
    entries: list[Any] = []
    decoder = json.JSONDecoder()
    try:
        with open(path, encoding="utf-8") as handle:
            text = handle.read(_CHUNK)
            place = _BLANK.match(text).end()  # type: ignore[union-attr]
            if text[place : place + 1] != "[":
                raise DataError(f"{path} does not hold a JSON array (begins with {text[:20]!r})")
            place += 1
            while len(entries) < count:
                place = _BLANK.match(text, place).end()  # type: ignore[union-attr]
                if text[place : place + 1] == "]":
                    break
                try:
                    value, end = decoder.raw_decode(text, place)
                    whole = end < len(text)  # a number at the end of what was read may go on
                except ValueError:
                    whole = False
                if whole:
                    entries.append(value)
                    place = end
                elif more := handle.read(_CHUNK):
                    text, place = text[place:] + more, 0
                else:
                    raise DataError(
                        f"{path} is not valid JSON after entry {len(entries)}; it is damaged or half-copied"
                    )
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error})") from None
    return entries
