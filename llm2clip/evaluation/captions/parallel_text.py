"""Captions as text files with a line per image, as Multi30k has them (Elliott et al., arXiv 1605.00459).

Task 1 translates one description of each image: `test_2016_flickr.en`, `test_2016_flickr.de`, ... Task 2 has five
independent descriptions per language: `test_2016.1.en` to `test_2016.5.de`. All may be compressed (.gz).
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Sequence
from pathlib import Path

from llm2clip.errors import DataError
from llm2clip.evaluation.captions.base import Caption, CaptionFile, ImageCaptions

# <set>[.<number>].<language>[.txt][.gz]
_NAME = re.compile(r"(.+?)(?:\.(\d+))?\.([a-z]{2,3}(?:[-_][A-Za-z]+)?)(?:\.txt)?(?:\.gz)?")
_TABLES = ("tar", "csv", "tsv")  # three letters, but no language


def is_text_file(path: Path) -> bool:
    """Whether a file's name is one of these."""
    found = _NAME.fullmatch(path.name)
    return found is not None and found[3] not in _TABLES


def read_parallel_text(paths: Sequence[Path], original: str = "") -> CaptionFile:
    """The captions of files that have the same images line by line.

    Args:
        paths: the files; languages and numbers are told by their names.
        original: language that the others translate; "": that of the first file.

    Raises:
        DataError: the files differ in their number of lines, or one cannot be read.
    """
    lines: dict[str, dict[int, list[str]]] = {}
    counts: dict[str, int] = {}
    for path in paths:
        found = _NAME.fullmatch(path.name)
        assert found is not None
        own = lines.setdefault(found[3], {})
        number = int(found[2] or 1)
        if number in own:
            raise DataError(f"{path}: there are two files of language {found[3]} with the number {number}")
        own[number] = _read(path)
        counts[str(path)] = len(own[number])
    if len(set(counts.values())) != 1:
        listing = ", ".join(f"{name}: {count}" for name, count in counts.items())
        raise DataError(f"the files must have a line for each image, but their lengths differ ({listing})")
    original = original or next(iter(lines))
    if original not in lines:
        raise DataError(
            f"original: no file of the language {original!r}; languages found: {', '.join(lines)}"
        )
    images = []
    for row in range(next(iter(counts.values()))):
        captions = {
            language: tuple(
                Caption(text, f"description {number}")
                for number, texts in sorted(own.items())
                if (text := texts[row])
            )
            for language, own in lines.items()
        }
        translations = {name: texts for name, texts in captions.items() if name != original and texts}
        images.append(ImageCaptions(f"line {row + 1}", captions[original], translations))
    return CaptionFile(images, language=original)


def _read(path: Path) -> list[str]:
    try:
        raw = path.read_bytes()
        data = gzip.decompress(raw) if path.suffix == ".gz" else raw
        # not splitlines: a text may hold other separators (U+2028)
        return [line.strip() for line in data.decode("utf-8-sig").removesuffix("\n").split("\n")]
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text: {error}") from error
