"""Tables as sources: .jsonl and .csv with image paths, .parquet with image bytes or paths."""

from __future__ import annotations

import csv
import os
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llm2clip.data.sample import META_FIELDS, Sample, parse_json_record, sample_from_record
from llm2clip.errors import BadSampleError, DataError
from llm2clip.files import file_state, require_regular

# columns that may name or hold the image, in order of preference
IMAGE_COLUMNS = (
    "image",
    "image_path",
    "file_name",
    "filename",
    "filepath",
    "path",
    "file",
    "img",
    "jpg",
    "png",
    "webp",
)
# decoded row groups kept in memory per process
CACHE_BYTES = 512 << 20
PROBE_ROWS = 100


def _image_column(names: Sequence[str]) -> str | None:
    return next((name for name in IMAGE_COLUMNS if name in names), None)


class _Table:
    """What the table sources share: rows become samples, paths are relative to the table's folder."""

    def __init__(self, paths: Sequence[Path], name: str, max_image_bytes: int) -> None:
        self.name = name
        self._paths = list(paths)
        self._labels = [path.parent.name + "/" + path.name if len(paths) > 1 else path.name for path in paths]
        self._max_image_bytes = max_image_bytes
        self._blocks: list[tuple[int, int]] = []

    @property
    def blocks(self) -> Sequence[tuple[int, int]]:
        return self._blocks

    def __len__(self) -> int:
        return self._blocks[-1][1] if self._blocks else 0

    def __getitem__(self, index: int) -> Sample:
        return self._read(index, True)

    def captions_of(self, index: int) -> Sample:
        return self._read(index, False)

    def image_stamp(self, index: int) -> str:
        """What changes with the image, as far as that shows without reading it: its own file's state or the table's.

        Raises:
            BadSampleError: the row cannot be read.
        """
        file, key, row = self._row(index, False)
        column = _image_column(list(row))
        cell = row[column] if column is not None else None
        if isinstance(cell, str) and cell:
            return f"{cell} {file_state(self._paths[file].parent / cell)}"
        return f"{key} {file_state(self._paths[file])}"

    def _row(self, index: int, with_image: bool) -> tuple[int, str, Mapping[str, Any]]:
        """(number of the file, key, row)."""
        raise NotImplementedError

    def _read(self, index: int, with_image: bool) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        file, key, row = self._row(index, with_image)
        record = dict(row)
        column = _image_column(list(record))
        cell = record.pop(column) if column is not None else None
        image = self._image(key, self._paths[file].parent, cell) if with_image else None
        sample = sample_from_record(key, record, image)
        if isinstance(cell, str):
            sample = Sample(
                sample.key, sample.captions, sample.image, str(record.get("group") or cell), sample.meta
            )
        if not sample.captions:
            raise BadSampleError(key, "it has no caption with text")
        return sample

    def _image(self, key: str, folder: Path, cell: Any) -> bytes | None:
        if isinstance(cell, Mapping):
            # the struct of Hugging Face datasets: the bytes, or a path beside the table
            cell = cell.get("bytes") or cell.get("path")
        if cell is None or cell == "":
            return None
        if isinstance(cell, (bytes, bytearray, memoryview)):
            return bytes(cell)
        if not isinstance(cell, str):
            raise BadSampleError(key, f"its image is a {type(cell).__name__}, expected a path or bytes")
        path = folder / cell
        try:
            size = require_regular(path)
            if size > self._max_image_bytes:
                raise BadSampleError(
                    key, f"its image {cell} has {size} bytes, more than the {self._max_image_bytes} allowed"
                )
            return path.read_bytes()
        except OSError as error:
            raise BadSampleError(key, f"its image {path} cannot be read ({error.strerror})") from None
        except ValueError as error:
            raise BadSampleError(key, f"its image path {cell!r} is not a path ({error})") from None

    def _require_usable(self) -> None:
        fields: Counter[str] = Counter()
        reason = ""
        step = max(1, len(self) // PROBE_ROWS)
        for index in range(0, len(self), step):
            try:
                self.captions_of(index)
                return
            except BadSampleError as error:
                reason = reason or str(error)
            try:
                fields.update(self._row(index, False)[2].keys())
            except BadSampleError:
                continue
        if step > 1:
            for index in range(len(self)):
                try:
                    self.captions_of(index)
                    return
                except BadSampleError:
                    continue
        listing = ", ".join(fields) or "none"
        raise DataError(
            f"{self.name} has no sample that can be used in {len(self)} rows: expected at least one column "
            f"of text besides {', '.join(sorted(META_FIELDS)[:6])}, ...; fields found: {listing}"
            + (f" ({reason})" if reason else "")
        )


class JsonlSource(_Table):
    """One JSON object per line: an image path and any number of caption fields.

    Only the offsets of the lines are in memory.
    """

    def __init__(
        self, paths: Sequence[Path], *, name: str, limit: int | None = None, max_image_bytes: int = 256 << 20
    ) -> None:
        super().__init__(paths, name, max_image_bytes)
        self._starts: list[np.ndarray[Any, Any]] = []
        total = 0
        for path in paths:
            starts = _line_starts(path)
            starts = starts[: None if limit is None else limit - total]
            self._starts.append(starts)
            if len(starts):
                self._blocks.append((total, total + len(starts)))
            total += len(starts)
            if limit is not None and total >= limit:
                break
        self._require_usable()

    def _row(self, index: int, with_image: bool) -> tuple[int, str, Mapping[str, Any]]:
        file = 0
        while index >= len(self._starts[file]):
            index -= len(self._starts[file])
            file += 1
        number, start, stop = (int(value) for value in self._starts[file][index])
        key = f"{self._labels[file]}:{number}"
        with open(self._paths[file], "rb") as handle:
            handle.seek(start)
            line = handle.read(stop - start)
        return file, key, self._parse(key, line)

    def _parse(self, key: str, line: bytes) -> Mapping[str, Any]:
        """One line as a row; raises BadSampleError."""
        return parse_json_record(key, line)


def _line_starts(path: Path) -> np.ndarray[Any, Any]:
    """(line number from 1, first byte, end) of every line that is not blank, int64 of shape (n, 3)."""
    rows: list[tuple[int, int, int]] = []
    position = 0
    try:
        with open(path, "rb") as handle:
            for number, line in enumerate(handle, 1):
                if line.strip():
                    rows.append((number, position, position + len(line)))
                position += len(line)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    return np.asarray(rows, dtype=np.int64).reshape(-1, 3)


class CsvSource(_Table):
    """A .csv file with a header line: an image path column and any number of caption columns."""

    def __init__(
        self, paths: Sequence[Path], *, name: str, limit: int | None = None, max_image_bytes: int = 256 << 20
    ) -> None:
        super().__init__(paths, name, max_image_bytes)
        self._rows: list[tuple[int, int, dict[str, Any]]] = []
        for file, path in enumerate(paths):
            start = len(self._rows)
            self._rows += [(file, line, row) for line, row in _csv_rows(path)]
            if limit is not None:
                del self._rows[limit:]
            if len(self._rows) > start:
                self._blocks.append((start, len(self._rows)))
        self._require_usable()

    def _row(self, index: int, with_image: bool) -> tuple[int, str, Mapping[str, Any]]:
        file, line, row = self._rows[index]
        return file, f"{self._labels[file]}:{line}", row


def _csv_rows(path: Path) -> list[tuple[int, dict[str, Any]]]:
    # the default limit of 128 KiB per field would refuse long captions
    previous = csv.field_size_limit(1 << 30)
    try:
        with open(path, newline="", encoding="utf-8-sig") as handle:
            reader = csv.DictReader(handle)
            # cells beyond the header have the key None
            return [
                (reader.line_num, {name: cell for name, cell in row.items() if isinstance(name, str)})
                for row in reader
            ]
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is not a CSV file in UTF-8 ({error})") from error
    finally:
        csv.field_size_limit(previous)


class ParquetSource(_Table):
    """Parquet files with an image column (bytes, path or `{bytes, path}`) and caption columns.

    Rows are read by row group; decoded groups are cached up to half a gigabyte per process.
    """

    def __init__(
        self, paths: Sequence[Path], *, name: str, limit: int | None = None, max_image_bytes: int = 256 << 20
    ) -> None:
        super().__init__(paths, name, max_image_bytes)
        self._groups: list[tuple[int, int]] = []  # (file, row group) of each block
        self._open: dict[int, Any] = {}
        self._cache: OrderedDict[tuple[int, bool], Any] = OrderedDict()
        total = 0
        for file, path in enumerate(paths):
            metadata = self._parquet(file).metadata
            for group in range(metadata.num_row_groups):
                count = metadata.row_group(group).num_rows
                count = count if limit is None else min(count, limit - total)
                if count > 0:
                    self._blocks.append((total, total + count))
                    self._groups.append((file, group))
                    total += count
            if os.path.getsize(path) and self._columns(file) == []:
                raise DataError(f"{path} has no columns")
        self._stops = np.asarray([stop for _, stop in self._blocks], dtype=np.int64)
        self._require_usable()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}, "_cache": OrderedDict()}

    def _parquet(self, file: int) -> Any:
        if file not in self._open:
            try:
                import pyarrow
                import pyarrow.parquet as parquet
            except ImportError:
                raise DataError("reading .parquet needs pyarrow; install llm2clip[train]") from None
            try:
                self._open[file] = parquet.ParquetFile(self._paths[file])
            except (OSError, pyarrow.ArrowException) as error:
                raise DataError(f"{self._paths[file]} is not a readable parquet file ({error})") from error
        return self._open[file]

    def _columns(self, file: int) -> list[str]:
        return list(self._parquet(file).schema_arrow.names)

    def _row(self, index: int, with_image: bool) -> tuple[int, str, Mapping[str, Any]]:
        block = int(np.searchsorted(self._stops, index, side="right"))
        file, group = self._groups[block]
        row = index - self._blocks[block][0]
        key = f"{self._labels[file]}:{group}:{row}"
        try:
            table = self._table(block, with_image)
            return file, key, table.slice(row, 1).to_pylist()[0]
        except (OSError, ValueError) as error:
            # pyarrow's errors are subclasses of these
            raise BadSampleError(key, f"its row group cannot be read ({error})") from None

    def _table(self, block: int, with_image: bool) -> Any:
        wanted = (block, with_image)
        if wanted in self._cache:
            self._cache.move_to_end(wanted)
            return self._cache[wanted]
        file, group = self._groups[block]
        columns = self._columns(file)
        if not with_image:
            column = _image_column(columns)
            # a path column stays: it is cheap, and it is the group of samples without one
            if column is not None and str(self._parquet(file).schema_arrow.field(column).type) not in (
                "string",
                "large_string",
            ):
                columns.remove(column)
        table = self._parquet(file).read_row_group(group, columns=columns)
        self._cache[wanted] = table
        while len(self._cache) > 1 and sum(cached.nbytes for cached in self._cache.values()) > CACHE_BYTES:
            self._cache.popitem(last=False)
        return table
