"""Is a store what its index says? Presence, sizes, headers, checksums, and where exactly damage lies."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from llm2clip.data.store_format import (
    BLOCK_ROWS,
    INDEX_NAME,
    LookupEntry,
    ShardEntry,
    StoreIndex,
    not_finite_blocks,
    wrong_blocks,
)
from llm2clip.data.store_lookup import AddressTable, as_digests, count_doubles
from llm2clip.data.store_rows import check_tensors
from llm2clip.data.tensorfile import map_tensors, tensor_layout
from llm2clip.errors import StoreError
from llm2clip.files import TMP_SUFFIX, sha256_file
from llm2clip.settings import StoreDtype


@dataclass(frozen=True)
class Damage:
    """What is wrong with a file of the store.

    Attributes:
        reason: in words.
        rows: [start, stop) of rows, counted inside the shard, that cannot be trusted; empty for the lookup table.
    """

    reason: str
    rows: tuple[tuple[int, int], ...] = ()

    @property
    def count(self) -> int:
        """How many rows that are."""
        return sum(stop - start for start, stop in self.rows)


@dataclass(frozen=True)
class StoreReport:
    """What `verify_store` found."""

    path: Path
    rows: int
    shards: int
    bytes: int
    complete: bool
    damaged: dict[str, Damage] = field(default_factory=dict)  # by file
    stray: list[str] = field(default_factory=list)  # files of an interrupted write, not part of the store
    duplicates: int = 0
    checksums: bool = True  # False: only presence, sizes and headers were looked at

    @property
    def ok(self) -> bool:
        """True when nothing is damaged or doubled."""
        return not self.damaged and not self.duplicates

    def __str__(self) -> str:
        lines = [
            f"{self.path}: {self.rows} captions in {self.shards} shard{'' if self.shards == 1 else 's'}, "
            f"{self.bytes / 2**20:.1f} MiB, " + ("complete" if self.complete else "unfinished")
        ]
        for file, damage in self.damaged.items():
            lines.append(f"  damaged: {file}: {damage.reason}")
            if damage.rows:
                spans = ", ".join(f"{start}–{stop - 1}" for start, stop in damage.rows[:20])
                more = f" and {len(damage.rows) - 20} more ranges" if len(damage.rows) > 20 else ""
                lines.append(f"    rows {spans}{more} of this shard ({damage.count} captions)")
        lines += [f"  left over from an interrupted write, ignored: {name}" for name in self.stray]
        if self.duplicates:
            lines.append(f"  {self.duplicates} captions are stored twice")
        if self.ok:
            lines.append(
                "  all checksums agree"
                if self.checksums
                else "  every file is there and whole by its size; checksums were not compared"
            )
        return "\n".join(lines)


def verify_store(path: str | os.PathLike[str], *, checksums: bool = True) -> StoreReport:
    """Check every file of the store at `path`: presence, size, header and (unless told not to) SHA-256.

    Where a shard's SHA-256 differs, the checksums of its blocks tell which rows are damaged.

    Raises:
        StoreError: there is no store at `path` or its index is damaged.
    """
    root = Path(path)
    index = StoreIndex.load(root)
    damaged: dict[str, Damage] = {}
    digests = []
    for entry in index.shards:
        if problem := check_shard(root, entry, index.dim, index.dtype, checksum=checksums):
            damaged[entry.file] = problem
        else:
            digests.append(as_digests(map_tensors(root / entry.file)["digests"]))
    if index.lookup is not None and (problem := _check_lookup(root, index.lookup, checksums)):
        damaged[index.lookup.file] = problem
    return StoreReport(
        path=root,
        rows=index.rows,
        shards=len(index.shards),
        bytes=sum(entry.bytes for entry in index.shards),
        complete=index.complete,
        damaged=damaged,
        stray=[file.name for file in stray_files(root, index)],
        duplicates=count_doubles(np.concatenate(digests)) if digests else 0,
        checksums=checksums,
    )


def check_shard(
    root: Path, entry: ShardEntry, dim: int, dtype: StoreDtype, *, checksum: bool = True
) -> Damage | None:
    """What is wrong with a shard, or None: presence, size, header, shapes and (if asked) SHA-256 and values."""
    path = root / entry.file
    everything = ((0, entry.rows),)
    try:
        layout = tensor_layout(path, expected_bytes=entry.bytes)
        check_tensors(path, {name: spec for name, (spec, _) in layout.items()}, entry, dim, dtype)
    except StoreError as problem:
        return Damage(str(problem), everything)
    if not checksum:
        return None
    tensors, same = map_tensors(path), sha256_file(path) == entry.sha256
    # checksums say that nothing changed since it was written, not that it was written well
    blocks = not_finite_blocks(tensors, dtype) if same else wrong_blocks(tensors, entry.rows)
    if not len(blocks):
        # the damage lies in the header or among the checksums themselves: nothing but the file tells
        return None if same else Damage("its content does not match its checksum, but every row does")
    edges = np.flatnonzero(np.diff(blocks) > 1) + 1
    ranges = [(int(part[0]), int(part[-1]) + 1) for part in np.split(blocks, edges)]
    rows = tuple((start * BLOCK_ROWS, min(stop * BLOCK_ROWS, entry.rows)) for start, stop in ranges)
    return Damage(
        "its content does not match its checksum" if not same else "it holds NaN or infinite values", rows
    )


def _check_lookup(root: Path, entry: LookupEntry, checksum: bool) -> Damage | None:
    path = root / entry.file
    try:
        AddressTable.load(path, rows=entry.rows, expected_bytes=entry.bytes)
    except StoreError as problem:
        return Damage(str(problem))
    if checksum and sha256_file(path) != entry.sha256:
        return Damage("its content does not match its checksum; it is only a table made from the shards")
    return None


def stray_files(root: Path, index: StoreIndex) -> list[Path]:
    """Files of interrupted writes: named like ours, but not in the index."""
    named = {entry.file for entry in index.shards}
    if index.lookup is not None:
        named.add(index.lookup.file)
    patterns = ("part-*", "shard-*", "lookup-*", f"{INDEX_NAME}{TMP_SUFFIX}.*")
    candidates = [file for pattern in patterns for file in root.glob(pattern)]
    return sorted(file for file in candidates if file.name not in named and file.is_file())
