"""Pairs of sentences with human scores of their similarity: STS-B and its translations.

Read are STSbenchmark's own files (tab-separated, no header: genre, file, year, id, score, two sentences), GLUE's (.tsv
with a header that names sentence1, sentence2, score), and .csv files with such a header or of three columns (two
sentences, score), as stsb_multi_mt has them.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from llm2clip.errors import DataError

# of a file without header: score, sentence 1, sentence 2
_STSBENCHMARK = (4, 5, 6)
_THREE = (2, 0, 1)
_NAMES = (
    ("score", "similarity_score", "similarity"),
    ("sentence1", "sentence_1"),
    ("sentence2", "sentence_2"),
)


@dataclass(frozen=True)
class SentencePairs:
    """Sentence pairs and what people said of them.

    Attributes:
        name: as in the settings.
        first, second: the sentences.
        scores: (n,) float64; larger is more similar.
        left_out: lines without score or sentence, as in GLUE's test files.
    """

    name: str
    first: list[str]
    second: list[str]
    scores: npt.NDArray[np.float64]
    left_out: list[str]


def read_sentence_pairs(name: str, path: Path) -> SentencePairs:
    """The pairs of a file.

    Raises:
        DataError: it cannot be read, has no such columns, or fewer than three pairs.
    """
    rows = list(_rows(path))
    if not rows:
        raise DataError(f"{path} is empty; expected sentence pairs with scores")
    columns = _columns_of_header(rows[0][1])
    body = rows[1:] if columns else rows
    columns = columns or _columns_by_number(rows[0][1], path)
    first, second, scores, left_out = [], [], [], []
    for number, row in body:
        score, one, two = (row[column].strip() if column < len(row) else "" for column in columns)
        try:
            value = float(score)
        except ValueError:
            value = float("nan")
        if not one or not two or not np.isfinite(value):
            left_out.append(f"line {number}")
            continue
        first.append(one)
        second.append(two)
        scores.append(value)
    if len(scores) < 3:
        raise DataError(
            f"{path}: {len(scores)} of {len(body)} lines have two sentences and a score; at least 3 are needed. A test "
            "file whose scores are hidden cannot be used."
        )
    return SentencePairs(name, first, second, np.array(scores), left_out)


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    tabs = path.suffix.lower() == ".tsv"
    previous = csv.field_size_limit(1 << 30)
    try:
        with open(path, newline="", encoding="utf-8-sig") as handle:
            # STSbenchmark's sts-test.csv holds tabs, and quotes that are never closed
            tabs = tabs or "\t" in handle.readline()
            handle.seek(0)
            if tabs:
                for number, line in enumerate(handle, 1):
                    if line.strip():
                        yield number, line.rstrip("\r\n").split("\t")
            else:
                reader = csv.reader(handle)
                for row in reader:
                    if any(row):
                        yield reader.line_num, row
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is not a table in UTF-8 ({error})") from error
    finally:
        csv.field_size_limit(previous)


def _columns_of_header(row: Sequence[str]) -> tuple[int, ...] | None:
    names = [cell.strip().lower() for cell in row]
    found = [next((names.index(name) for name in choices if name in names), -1) for choices in _NAMES]
    return tuple(found) if min(found) >= 0 else None


def _columns_by_number(row: Sequence[str], path: Path) -> tuple[int, ...]:
    for columns in (_STSBENCHMARK, _THREE):
        if max(columns) < len(row) and (columns is not _THREE or len(row) == 3):
            try:
                float(row[columns[0]])
            except ValueError:
                continue
            return columns
    raise DataError(
        f"{path} has no columns sentence1, sentence2 and score, and without a header it must have three columns (two "
        f"sentences, score) or STSbenchmark's seven; its first line has {len(row)}: {', '.join(row)[:120]}"
    )
