"""A folder of images as a source: no captions, every image file below it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from llm2clip.data.sample import Sample
from llm2clip.data.sources import MAX_MEMBER_BYTES
from llm2clip.errors import BadSampleError, DataError
from llm2clip.files import file_state, require_regular

SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
)


class ImageFolder:
    """The image files below a directory, in the order of their paths.

    Hidden files and directories are left out, and links to directories are not followed. A sample's key is the path
    below the directory.

    Args:
        root: the directory.
        max_bytes: larger files are bad samples.

    Raises:
        DataError: there is no image.
    """

    def __init__(self, root: Path, *, max_bytes: int = MAX_MEMBER_BYTES) -> None:
        self.name = os.fspath(root)
        self._root, self._max_bytes = root, max_bytes
        self._names = image_names(root)
        if not self._names:
            raise DataError(
                f"{root} has no image: expected files {', '.join(sorted(SUFFIXES))} in it or below"
            )

    def __len__(self) -> int:
        return len(self._names)

    @property
    def blocks(self) -> Sequence[tuple[int, int]]:
        return [(0, len(self))]

    def __getitem__(self, index: int) -> Sample:
        name = self._names[index]
        path = self._root / name
        try:
            size = require_regular(path)
            if size > self._max_bytes:
                raise BadSampleError(name, f"it has {size} bytes, more than the {self._max_bytes} allowed")
            return Sample(name, {}, path.read_bytes(), name)
        except OSError as error:
            raise BadSampleError(name, f"{path} cannot be read ({error.strerror})") from None

    def captions_of(self, index: int) -> Sample:
        return Sample(self._names[index], {}, None, self._names[index])

    def image_stamp(self, index: int) -> str:
        """Path, size and time of change of the file."""
        name = self._names[index]
        return f"{name} {file_state(self._root / name)}"


def image_names(root: Path) -> list[str]:
    """Paths of the image files below `root`, sorted."""
    found: list[str] = []
    for directory, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        below = os.path.relpath(directory, root)
        found += [
            name if below == "." else os.path.join(below, name)
            for name in files
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES
        ]
    return sorted(found)
