"""Building an embedding store so that a kill at any instant loses nothing that was committed.

The unit of commitment is a part file of `commit_rows` embeddings. A part is written atomically, then
index.json is replaced atomically to name it: until that instant the part does not exist for anyone.
When `shard_rows` embeddings have gathered in parts they are merged into one shard the same way: the
shard is written, the index is replaced to name it instead of the parts, the parts are removed. Files
that the index does not name are left over from a kill between two of these steps; the next writer
removes them (at most one part is computed again).
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llm2clip.data.store_format import (
    INDEX_NAME,
    DigestIndex,
    Digests,
    ShardEntry,
    StoreIndex,
    as_digests,
    digest_array,
    encode_rows,
    fingerprint_difference,
    shard_specs,
)
from llm2clip.data.tensorfile import map_tensors, write_tensors
from llm2clip.errors import StoreError
from llm2clip.files import TMP_SUFFIX, disk_errors, sha256_file
from llm2clip.settings import StoreDtype

LOCK_NAME = ".lock"
_COPY_ROWS = 4096


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
            self._lock = _lock(self.path)
        try:
            self._index = self._open(dim, dtype, fingerprint)
            self._lookup = DigestIndex()
            for entry, start in zip(self._index.shards, self._index.starts().tolist(), strict=False):
                tensors = map_tensors(self.path / entry.file, expected_bytes=entry.bytes)
                self._lookup.extend(as_digests(tensors["digests"]), start)
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
        if embeddings.shape != (len(texts), self._index.dim):
            raise ValueError(
                f"embeddings: expected shape {(len(texts), self._index.dim)}, got {tuple(embeddings.shape)}"
            )
        digests = digest_array(texts)
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
        while self._parts():
            self._merge_parts()
        if not self._index.complete:
            self._index.complete = True
            self._index.save(self.path)

    def absorb(self, other: str | os.PathLike[str]) -> int:
        """Copy what the store at `other` has and this one lacks, in its stored precision.

        Interrupted anywhere, it can be called again. Returns the number of captions copied.

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
            new = np.flatnonzero(self._lookup.find(as_digests(tensors["digests"])) < 0)
            for start in range(0, len(new), self._shard_rows):
                rows = new[start : start + self._shard_rows]
                self._commit({name: [tensor[rows]] for name, tensor in tensors.items()}, len(rows))
        return self._index.rows - before

    def _commit_pending(self, count: int) -> None:
        digests, values = np.concatenate(self._pending_digests), torch.cat(self._pending)
        arrays = encode_rows(values[:count], self._index.dtype)
        raw = digests[:count].view(np.uint8).reshape(count, -1)
        self._commit({name: [array] for name, array in (arrays | {"digests": raw}).items()}, count)
        self._pending_digests, self._pending = [digests[count:]], [values[count:]]
        self._pending_keys.difference_update(row.tobytes() for row in digests[:count])

    def _commit(self, chunks: Mapping[str, Sequence[npt.NDArray[Any]]], rows: int) -> None:
        entry = self._write("part", rows, chunks)
        first_row = self._index.rows
        self._index.shards.append(entry)
        self._index.complete = False
        try:
            self._index.save(self.path)
        except BaseException:
            # the index on disk does not name it, so this one must not either
            self._index.shards.pop()
            raise
        self._lookup.extend(np.concatenate([as_digests(chunk) for chunk in chunks["digests"]]), first_row)
        while sum(part.rows for part in self._parts()) >= self._shard_rows:
            self._merge_parts()

    def _parts(self) -> list[ShardEntry]:
        return [entry for entry in self._index.shards if entry.file.startswith("part-")]

    def _merge_parts(self) -> None:
        merged: list[ShardEntry] = []
        for part in self._parts():
            if merged and sum(entry.rows for entry in merged) + part.rows > self._shard_rows:
                break
            merged.append(part)
        sources = [map_tensors(self.path / part.file, expected_bytes=part.bytes) for part in merged]
        rows = sum(part.rows for part in merged)
        names = shard_specs(rows, self._index.dim, self._index.dtype)
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
        taken = {entry.file for entry in self._index.shards}
        number = len(taken)
        while (name := f"{kind}-{number:06d}.safetensors") in taken:
            number += 1
        digest, size = write_tensors(
            self.path / name, shard_specs(rows, self._index.dim, self._index.dtype), chunks
        )
        return ShardEntry(name, rows, size, digest)


def _slices(arrays: Iterable[npt.NDArray[Any]]) -> Iterator[npt.NDArray[Any]]:
    for array in arrays:
        for start in range(0, len(array), _COPY_ROWS):
            yield array[start : start + _COPY_ROWS]


def _lock(root: Path) -> int:
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


def stray_files(root: Path, index: StoreIndex) -> list[Path]:
    """Files of interrupted writes: named like ours, but not in the index."""
    named = {entry.file for entry in index.shards}
    candidates = [*root.glob("part-*"), *root.glob("shard-*"), *root.glob(f"{INDEX_NAME}{TMP_SUFFIX}.*")]
    return sorted(file for file in candidates if file.name not in named and file.is_file())


def check_shard(
    root: Path, entry: ShardEntry, dim: int, dtype: StoreDtype, *, checksum: bool = True
) -> str | None:
    """What is wrong with a shard, or None: presence, size, header, shapes and (if asked) its SHA-256."""
    try:
        tensors = map_tensors(root / entry.file, expected_bytes=entry.bytes)
    except StoreError as problem:
        return str(problem)
    specs = shard_specs(entry.rows, dim, dtype)
    if {name: tensor.shape for name, tensor in tensors.items()} != {
        name: s.shape for name, s in specs.items()
    }:
        return "its tensors are not those that index.json promises"
    if checksum and sha256_file(root / entry.file) != entry.sha256:
        return "its content does not match its checksum"
    return None


def drop_shards(root: Path, files: set[str]) -> None:
    """Take `files` out of the store; `llm2clip embed` then computes their captions again."""
    with disk_errors(root):
        lock = _lock(root)
    try:
        index = StoreIndex.load(root)
        index.shards = [entry for entry in index.shards if entry.file not in files]
        index.complete = False
        index.save(root)
        for name in files:
            (root / name).unlink(missing_ok=True)
    finally:
        os.close(lock)
