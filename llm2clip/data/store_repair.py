"""Making a damaged store whole, and making one store of another: other precision, fewer dimensions."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llm2clip.data.store_check import Damage, StoreReport, check_shard, verify_store
from llm2clip.data.store_format import ShardEntry, StoreIndex, decode_rows, prefix_fingerprint
from llm2clip.data.store_lookup import as_digests
from llm2clip.data.store_writer import StoreWriter, lock_store, write_shard
from llm2clip.data.tensorfile import map_tensors
from llm2clip.errors import StoreError
from llm2clip.files import disk_errors
from llm2clip.progress import Progress
from llm2clip.settings import StoreDtype

_CHUNK_ROWS = 16384


def repair_store(path: str | os.PathLike[str], *, checksums: bool = True) -> StoreReport:
    """Drop the damaged rows, and only those, so that `llm2clip embed` computes them again.

    Damage is known to blocks of 1,024 rows where a shard's header is readable; a shard that is gone or cut is dropped
    whole. The rows that are left keep their bits. A damaged table of addresses is dropped too; the next writer makes
    a new one.

    Returns:
        The report of what was found before the repair.
    """
    report = verify_store(path, checksums=checksums)
    if not report.damaged:
        return report
    root = report.path
    with disk_errors(root):
        lock = lock_store(root)
    try:
        index = StoreIndex.load(root)
        kept: list[ShardEntry] = []
        for entry in index.shards:
            damage = report.damaged.get(entry.file)
            kept += [entry] if damage is None else _salvage(root, entry, damage, index)
        removed = [entry.file for entry in index.shards if entry not in kept]
        if index.lookup is not None:
            removed.append(index.lookup.file)
        if any(damage.count for damage in report.damaged.values()):
            index.generation += 1
            index.complete = False
        index.shards, index.lookup = kept, None
        index.save(root)
        for name in removed:
            (root / name).unlink(missing_ok=True)
    finally:
        os.close(lock)
    return report


def _salvage(root: Path, entry: ShardEntry, damage: Damage, index: StoreIndex) -> list[ShardEntry]:
    """The good rows of a damaged shard as a shard of its own; none where nothing of it can be trusted."""
    good = np.ones(entry.rows, bool)
    for start, stop in damage.rows:
        good[start:stop] = False
    if not good.any():
        return []
    rows = np.flatnonzero(good)
    tensors = map_tensors(root / entry.file, expected_bytes=entry.bytes)
    arrays = {name: tensor for name, tensor in tensors.items() if name != "checks"}

    def slices(array: npt.NDArray[Any]) -> Iterator[npt.NDArray[Any]]:
        for start in range(0, len(rows), _CHUNK_ROWS):
            yield array[rows[start : start + _CHUNK_ROWS]]

    kind = entry.file.partition("-")[0]  # parts stay parts: they are merged by their names
    name = index.new_name(kind)
    chunks = {tensor: slices(array) for tensor, array in arrays.items()}
    return [write_shard(root, name, len(rows), chunks, dim=index.dim, dtype=index.dtype)]


def convert_store(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    dtype: StoreDtype | None = None,
    dim: int | None = None,
) -> None:
    """Write the store `source` again in another precision, or with the first `dim` values of each embedding.

    No LLM is needed. Interrupted, the same call goes on.

    Args:
        source: a complete store.
        out: directory of the new store.
        dtype: precision of the new store; None: as it is.
        dim: values of an embedding that are kept (Matryoshka); None: all.

    Raises:
        StoreError: `source` is unfinished or damaged, or `out` holds something else.
    """
    root = Path(source)
    index = StoreIndex.load(root)
    if not index.complete:
        raise StoreError(f"{root} is unfinished; run `llm2clip embed` to its end before converting it")
    kept = index.dim if dim is None else dim
    if not 1 <= kept <= index.dim:
        raise StoreError(f"{root} holds embeddings of dimension {index.dim}; the first {dim} were asked for")
    with (
        StoreWriter(
            out,
            dim=kept,
            dtype=dtype or index.dtype,
            fingerprint=prefix_fingerprint(index.fingerprint, kept),
            shard_rows=max((entry.rows for entry in index.shards), default=1),
            commit_rows=_CHUNK_ROWS,
        ) as writer,
        Progress(index.rows, "converting", "captions") as shown,
    ):
        for entry in index.shards:
            if damage := check_shard(root, entry, index.dim, index.dtype):
                raise StoreError(
                    f"{root / entry.file}: {damage.reason}. Run `llm2clip store repair {root}` first."
                )
            tensors = map_tensors(root / entry.file, expected_bytes=entry.bytes)
            for start in range(0, entry.rows, _CHUNK_ROWS):
                rows = slice(start, start + _CHUNK_ROWS)
                scales = tensors["scales"][rows].copy() if "scales" in tensors else None
                values = decode_rows(tensors["embeddings"][rows, :kept].copy(), scales, index.dtype)
                writer.add_digests(as_digests(tensors["digests"][rows]), values)
                shown.update(len(values))
        writer.finish()
