"""Rows of a store's shards, read at random: the native reader where it is built, and its twin in NumPy."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from llm2clip.data.store_format import SCALED, ShardEntry, decode_rows, shard_specs
from llm2clip.data.tensorfile import TensorSpec, map_tensors, tensor_layout
from llm2clip.errors import StoreError
from llm2clip.settings import StoreDtype

_host: Any
try:
    _host = importlib.import_module("llm2clip._host")
except ImportError:  # built without a C++ compiler
    _host = None


class RowSource(Protocol):
    """Rows of several shards under running numbers."""

    def add(self, path: Path, entry: ShardEntry) -> None:
        """Take up the next shard.

        Raises:
            StoreError: the file is missing, cut, or does not hold what the index promises.
        """

    def read(self, rows: npt.NDArray[np.int64], out: npt.NDArray[np.float32]) -> None:
        """Write the first `out.shape[1]` values of every row (n,) to `out` (n, dim)."""


def open_rows(dim: int, dtype: StoreDtype) -> RowSource:
    """A source without shards yet."""
    return PythonRows(dim, dtype) if _host is None else NativeRows(dim, dtype)


class NativeRows:
    """Decodes while it gathers, on torch's threads. Rows that are not in memory are asked for all at once.

    A mapped file stays readable after it was removed, and holds no file descriptor.
    """

    def __init__(self, dim: int, dtype: StoreDtype) -> None:
        self._dim, self._dtype = dim, dtype
        self._reader = _host.RowReader(dim, dtype)

    def add(self, path: Path, entry: ShardEntry) -> None:
        layout = tensor_layout(path, expected_bytes=entry.bytes)
        check_tensors(path, {name: spec for name, (spec, _) in layout.items()}, entry, self._dim, self._dtype)
        scales = layout["scales"][1] if self._dtype in SCALED else 0
        try:
            self._reader.add(str(path), entry.rows, layout["embeddings"][1], scales)
        except OSError as problem:
            raise StoreError(f"{path} cannot be mapped: {problem.strerror}") from None

    def read(self, rows: npt.NDArray[np.int64], out: npt.NDArray[np.float32]) -> None:
        self._reader.read(rows, out, torch.get_num_threads())


class PythonRows:
    """The same in NumPy and torch; the definition the native reader is tested against."""

    def __init__(self, dim: int, dtype: StoreDtype) -> None:
        self._dim, self._dtype = dim, dtype
        self._shards: list[dict[str, npt.NDArray[Any]]] = []
        self._stops: list[int] = []

    def add(self, path: Path, entry: ShardEntry) -> None:
        tensors = map_tensors(path, expected_bytes=entry.bytes)
        specs = {name: spec for name, (spec, _) in tensor_layout(path).items()}
        check_tensors(path, specs, entry, self._dim, self._dtype)
        self._shards.append(tensors)
        self._stops.append((self._stops[-1] if self._stops else 0) + entry.rows)

    def read(self, rows: npt.NDArray[np.int64], out: npt.NDArray[np.float32]) -> None:
        shard_of = np.searchsorted(self._stops, rows, side="right")
        # ascending rows inside a shard: the disk is read forwards
        order = np.lexsort((rows, shard_of))
        for group in np.split(order, np.flatnonzero(np.diff(shard_of[order])) + 1):
            if not len(group):
                continue
            number = int(shard_of[group[0]])
            tensors = self._shards[number]
            local = rows[group] - (self._stops[number - 1] if number else 0)
            scales = tensors["scales"][local] if "scales" in tensors else None
            # sliced after the rows were taken: a copy, which decoding needs
            values = np.ascontiguousarray(tensors["embeddings"][local][:, : out.shape[1]])
            out[group] = decode_rows(values, scales, self._dtype).numpy()


def check_tensors(
    path: Path, found: dict[str, TensorSpec], entry: ShardEntry, dim: int, dtype: StoreDtype
) -> None:
    """Make sure that a shard has the tensors that the index promises.

    Raises:
        StoreError: it has others.
    """
    promised = shard_specs(entry.rows, dim, dtype)
    # stores of version 1 have no checks
    if found not in (promised, {name: spec for name, spec in promised.items() if name != "checks"}):
        raise StoreError(f"{path} does not hold the tensors that index.json promises")
