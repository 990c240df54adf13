"""Building an embedding store so that a kill at any instant loses nothing that was committed.

The unit of commitment is a part file of `commit_rows` embeddings. A part is written atomically, then
index.json is replaced atomically to name it: until that instant the part does not exist for anyone.
When `shard_rows` embeddings have gathered in parts they are merged into one shard the same way: the
shard is written, the index is replaced to name it instead of the parts, the parts are removed. Files
that the index does not name are left over from a kill between two of these steps; the next writer
removes them (at most one part is computed again). Rows keep their numbers through all of this, so
processes that read the store meanwhile go on.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llm2clip.data.store_check import stray_files
from llm2clip.data.store_format import (
    INDEX_NAME,
    BlockChecks,
    LookupEntry,
    ShardEntry,
    StoreIndex,
    encode_rows,
    fingerprint_difference,
    shard_specs,
)
from llm2clip.data.store_lookup import Digests, as_digests, digest_array, open_lookup
from llm2clip.data.tensorfile import map_tensors, write_tensors
from llm2clip.errors import StoreError
from llm2clip.files import atomic_path, disk_errors
from llm2clip.settings import StoreDtype

LOCK_NAME = ".lock"
_COPY_ROWS = 4096
# so many captions may be outside the table of addresses before a new one is written: 1.3 MiB in every reader
_TABLE_ROWS = 65536


class StoreWriter:
    """Adds embeddings to the store at `path`, which it creates or goes on with.

    Args:
        path: directory of the store.
        dim: dimension of an embedding.
        dtype: stored precision.
        fingerprint: identity of the encoder (JSON values).
        shard_rows: embeddings per shard file.
        commit_rows: embeddings per commit.

    Raises:
        StoreError: the store was begun with other values, is damaged, or another process writes to it.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        dim: int,
        dtype: StoreDtype,
        fingerprint: Mapping[str, Any],
        shard_rows: int = 65536,
        commit_rows: int = 2048,
    ) -> None:
        if dim < 1 or shard_rows < 1 or commit_rows < 1:
            raise ValueError(
                f"dim, shard_rows, commit_rows: expected > 0, got {dim}, {shard_rows}, {commit_rows}"
            )
        self.path = Path(path)
        self._shard_rows = shard_rows
        self._commit_rows = min(commit_rows, shard_rows)
        with disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = lock_store(self.path)
        try:
            self._index = self._open(dim, dtype, fingerprint)
            self._lookup = open_lookup(self.path, self._index)
        except BaseException:
            os.close(self._lock)
            raise
        self._pending_digests: list[Digests] = []
        self._pending: list[Tensor] = []
        self._pending_keys: set[bytes] = set()

    def _open(self, dim: int, dtype: StoreDtype, fingerprint: Mapping[str, Any]) -> StoreIndex:
        if not (self.path / INDEX_NAME).exists():
            # a store gets its index before its first part, so shards without one are somebody's lost index
            if found := sorted(self.path.glob("*.safetensors")):
                raise StoreError(
                    f"{self.path} has {len(found)} safetensors files but no {INDEX_NAME}; it is not a store "
                    "that can be continued. Give an empty directory."
                )
            index = StoreIndex(dim, dtype, dict(fingerprint))
            index.save(self.path)
            return index
        index = StoreIndex.load(self.path)
        given = {"dim": dim, "dtype": dtype, **fingerprint}
        stored = {"dim": index.dim, "dtype": index.dtype, **index.fingerprint}
        if difference := fingerprint_difference(stored, given):
            raise StoreError(
                f"the embedding store {self.path} was begun with other settings or another encoder:\n  "
                + "\n  ".join(difference)
                + "\nGive another directory, or remove this one to embed everything again."
            )
        for file in stray_files(self.path, index):
            file.unlink(missing_ok=True)
        return index

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __len__(self) -> int:
        return self._index.rows + len(self._pending_keys)

    def close(self) -> None:
        """Release the store; embeddings that were not committed are dropped."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def contains(self, text: str) -> bool:
        """True when the embedding of `text` was added, committed or not."""
        return not self.missing([text])

    def missing(self, texts: Iterable[str]) -> list[str]:
        """The texts that are not in the store, each once, in order."""
        unique = list(dict.fromkeys(texts))
        digests = digest_array(unique)
        absent = self._lookup.find(digests) < 0
        return [
            unique[position]
            for position in np.flatnonzero(absent).tolist()
            if digests[position].tobytes() not in self._pending_keys
        ]

    def add(self, texts: Sequence[str], embeddings: Tensor) -> None:
        """Add embeddings (len(texts), dim); captions that the store has already are left as they are.

        Commits whenever `commit_rows` embeddings have gathered.

        Raises:
            StoreError: a value is not finite or does not fit the stored precision.
            UserError: no space left on disk; what was committed before is intact.
        """
        self.add_digests(digest_array(texts), embeddings)

    def add_digests(self, digests: Digests, embeddings: Tensor) -> None:
        """`add` for captions of which only the addresses (n, 2) are known."""
        if embeddings.shape != (len(digests), self._index.dim):
            raise ValueError(
                f"embeddings: expected shape {(len(digests), self._index.dim)}, got {tuple(embeddings.shape)}"
            )
        known = self._lookup.find(digests) >= 0
        keep: list[int] = []
        for position in np.flatnonzero(~known).tolist():
            key = digests[position].tobytes()
            if key not in self._pending_keys:
                self._pending_keys.add(key)
                keep.append(position)
        if keep:
            self._pending_digests.append(digests[keep])
            self._pending.append(embeddings.detach()[keep].to("cpu", torch.float32))
        while len(self._pending_keys) >= self._commit_rows:
            self._commit_pending(self._commit_rows)

    def flush(self) -> None:
        """Commit what was added and is not on disk yet."""
        if self._pending_keys:
            self._commit_pending(len(self._pending_keys))

    def finish(self) -> None:
        """Commit the rest, merge the parts into shards and mark the store complete."""
        self.flush()
        self._merge_all_parts()
        if not self._index.complete:
            self._index.complete = True
            self._index.save(self.path)
        self.write_lookup()

    def write_lookup(self) -> None:
        """Write the table of addresses where many captions lack in it, so that readers need no memory of their own.

        It covers what is committed. Peak memory is about 60 bytes a caption.
        """
        if self._lookup.unsorted <= max(_TABLE_ROWS, self._index.rows // 8):
            return
        table = self._lookup.table()
        name = self._index.new_name("lookup")
        digest, size = table.save(self.path / name)
        before, self._index.lookup = self._index.lookup, LookupEntry(name, len(table), size, digest)
        try:
            self._index.save(self.path)
        except BaseException:
            self._index.lookup = before
            raise
        if before is not None:
            (self.path / before.file).unlink(missing_ok=True)
        self._lookup = open_lookup(self.path, self._index)

    def absorb(self, other: str | os.PathLike[str]) -> int:
        """Take over what the store at `other` has and this one lacks, bit by bit.

        Whole shards of new captions become links to the same data where the file system has them; the rest is
        copied. Interrupted anywhere, it can be called again. Returns the number of captions taken over.

        Raises:
            StoreError: `other` was made by another encoder or is damaged.
        """
        self.flush()
        root = Path(other)
        index = StoreIndex.load(root)
        if index.dim != self._index.dim or index.dtype != self._index.dtype:
            raise StoreError(f"{root} holds {index.dtype} of dimension {index.dim}; {self.path} does not")
        if difference := fingerprint_difference(index.fingerprint, self._index.fingerprint):
            raise StoreError(
                f"{root} was made by another encoder than {self.path}:\n  " + "\n  ".join(difference)
            )
        before = self._index.rows
        for entry in index.shards:
            tensors = map_tensors(root / entry.file, expected_bytes=entry.bytes)
            digests = as_digests(tensors["digests"])
            new = np.flatnonzero(self._lookup.find(digests) < 0)
            if len(new) == entry.rows and not _is_part(entry):
                self._merge_all_parts()  # parts are merged in place, so no shard may stand between two of them
                self._adopt(root / entry.file, entry, digests)
                continue
            names = [name for name in tensors if name != "checks"]
            for start in range(0, len(new), self._shard_rows):
                rows = new[start : start + self._shard_rows]
                self._commit({name: [tensors[name][rows]] for name in names}, len(rows))
        return self._index.rows - before

    def _adopt(self, path: Path, entry: ShardEntry, digests: Digests) -> None:
        """Take over a whole shard under a name of our own, without copying it where the file system can."""
        name = self._index.new_name("shard")
        with atomic_path(self.path / name) as tmp:
            try:
                os.link(path, tmp)
            except OSError:
                shutil.copyfile(path, tmp)
        self._append(ShardEntry(name, entry.rows, entry.bytes, entry.sha256), digests)

    def _commit_pending(self, count: int) -> None:
        digests, values = np.concatenate(self._pending_digests), torch.cat(self._pending)
        arrays = encode_rows(values[:count], self._index.dtype)
        raw = digests[:count].view(np.uint8).reshape(count, -1)
        self._commit({name: [array] for name, array in (arrays | {"digests": raw}).items()}, count)
        self._pending_digests, self._pending = [digests[count:]], [values[count:]]
        self._pending_keys.difference_update(row.tobytes() for row in digests[:count])

    def _commit(self, chunks: Mapping[str, Sequence[npt.NDArray[Any]]], rows: int) -> None:
        digests = np.concatenate([as_digests(chunk) for chunk in chunks["digests"]])
        self._append(self._write("part", rows, chunks), digests)
        while sum(part.rows for part in self._parts()) >= self._shard_rows:
            self._merge_parts()

    def _append(self, entry: ShardEntry, digests: Digests) -> None:
        first_row = self._index.rows
        complete, self._index.complete = self._index.complete, False
        self._index.shards.append(entry)
        try:
            self._index.save(self.path)
        except BaseException:
            # the index on disk does not name it, so this one must not either
            self._index.shards.pop()
            self._index.complete = complete
            raise
        self._lookup.extend(digests, first_row)

    def _parts(self) -> list[ShardEntry]:
        return [entry for entry in self._index.shards if _is_part(entry)]

    def _merge_all_parts(self) -> None:
        while self._parts():
            self._merge_parts()

    def _merge_parts(self) -> None:
        merged: list[ShardEntry] = []
        for part in self._parts():
            if merged and sum(entry.rows for entry in merged) + part.rows > self._shard_rows:
                break
            merged.append(part)
        sources = [map_tensors(self.path / part.file, expected_bytes=part.bytes) for part in merged]
        rows = sum(part.rows for part in merged)
        names = [name for name in shard_specs(rows, self._index.dim, self._index.dtype) if name != "checks"]
        shard = self._write(
            "shard", rows, {name: _slices([source[name] for source in sources]) for name in names}
        )
        # parts stand in the order of their rows: one shard in the place of the first keeps all row numbers
        position = self._index.shards.index(merged[0])
        shards = [entry for entry in self._index.shards if entry not in merged]
        shards.insert(position, shard)
        before, self._index.shards = self._index.shards, shards
        try:
            self._index.save(self.path)
        except BaseException:
            self._index.shards = before
            raise
        for part in merged:
            (self.path / part.file).unlink(missing_ok=True)

    def _write(self, kind: str, rows: int, chunks: Mapping[str, Iterable[npt.NDArray[Any]]]) -> ShardEntry:
        return write_shard(
            self.path, self._index.new_name(kind), rows, chunks, dim=self._index.dim, dtype=self._index.dtype
        )


def write_shard(
    root: Path,
    name: str,
    rows: int,
    chunks: Mapping[str, Iterable[npt.NDArray[Any]]],
    *,
    dim: int,
    dtype: StoreDtype,
) -> ShardEntry:
    """Write a shard file of the store `root` atomically, with the checksums of its blocks.

    Args:
        root: directory of the store.
        name: file name.
        rows: rows of the shard.
        chunks: for `embeddings`, `digests` and (int8, fp8) `scales` arrays of rows that follow each other.
        dim, dtype: of the store.
    """
    specs = shard_specs(rows, dim, dtype)
    checks = BlockChecks(rows)
    watched: dict[str, Iterable[npt.NDArray[Any]]] = {
        tensor: checks.watch(chunks[tensor]) for tensor in specs if tensor != "checks"
    }
    # the last tensor of the file: asked for when the others have passed
    watched["checks"] = (values for values in [checks.values])
    digest, size = write_tensors(root / name, specs, watched)
    return ShardEntry(name, rows, size, digest)


def _is_part(entry: ShardEntry) -> bool:
    return entry.file.startswith("part-")


def _slices(arrays: Iterable[npt.NDArray[Any]]) -> Iterator[npt.NDArray[Any]]:
    for array in arrays:
        for start in range(0, len(array), _COPY_ROWS):
            yield array[start : start + _COPY_ROWS]


def lock_store(root: Path) -> int:
    """Keep other writers out until the descriptor is closed; a process that ends lets go of it."""
    descriptor = os.open(root / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise StoreError(
            f"another process is writing to the embedding store {root}; wait until it ends"
        ) from None
    except OSError:
        # a file system without locks: go on, as it was before locks
        return descriptor
    return descriptor
