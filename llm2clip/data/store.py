"""Caption embeddings on disk, addressed by the caption's text.

A store is written once by `StoreWriter` and read through memory maps by `EmbeddingStore`: opening
reads the addresses (24 bytes a caption stay in memory), embeddings stay on disk until they are asked for.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llm2clip.data.store_format import (
    DigestIndex,
    ShardEntry,
    StoreIndex,
    as_digests,
    caption_digest,
    decode_rows,
    digest_array,
    fingerprint_difference,
    preview,
    shard_specs,
)
from llm2clip.data.store_writer import StoreWriter, check_shard, drop_shards, stray_files
from llm2clip.data.tensorfile import map_tensors
from llm2clip.errors import StoreError
from llm2clip.settings import StoreDtype

__all__ = ["EmbeddingStore", "StoreReport", "StoreWriter", "caption_digest", "repair_store", "verify_store"]


class EmbeddingStore:
    """Embeddings of captions; open it with `EmbeddingStore.open(path)`.

    Attributes:
        path: directory of the store.
        dim: dimension of an embedding.
        dtype: stored precision; what is read is always fp32.
        fingerprint: identity of the encoder that made the embeddings.
        complete: False while `llm2clip embed` has not finished.
    """

    def __init__(self, path: Path, index: StoreIndex) -> None:
        self.path = path
        self.dim: int = index.dim
        self.dtype: StoreDtype = index.dtype
        self.fingerprint: dict[str, Any] = index.fingerprint
        self.complete: bool = index.complete
        self._shards: list[ShardEntry] = index.shards
        self._starts = index.starts()
        self._maps: dict[int, dict[str, npt.NDArray[Any]]] = {}
        self._lookup = DigestIndex()
        if index.shards:
            parts = [as_digests(self._tensors(number)["digests"]) for number in range(len(index.shards))]
            self._lookup.extend(np.concatenate(parts), 0)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> EmbeddingStore:
        """Open the store in directory `path`.

        Raises:
            StoreError: there is no store, or a shard is missing, cut or has no valid header.
        """
        root = Path(path)
        return cls(root, StoreIndex.load(root))

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __repr__(self) -> str:
        state = "" if self.complete else ", unfinished"
        return (
            f"EmbeddingStore({str(self.path)!r}, {len(self)} captions, dim {self.dim}, {self.dtype}{state})"
        )

    def __getstate__(self) -> dict[str, Any]:
        # a loader process maps the files again by itself
        return self.__dict__ | {"_maps": {}}

    def find(self, texts: Sequence[str]) -> npt.NDArray[np.int64]:
        """Row of each caption (n,), -1 where the store does not hold it."""
        return self._lookup.find(digest_array(texts))

    def rows(self, texts: Sequence[str]) -> npt.NDArray[np.int64]:
        """Row of each caption (n,).

        Raises:
            StoreError: captions are missing; names how many and the first ten.
        """
        rows = self.find(texts)
        if (rows < 0).any():
            missing = list(dict.fromkeys(texts[position] for position in np.flatnonzero(rows < 0).tolist()))
            state = "" if self.complete else " It is unfinished."
            raise StoreError(
                f"the embedding store {self.path} ({len(self)} captions) lacks {len(missing)} of the "
                f"captions asked for.{state} Run `llm2clip embed` on the same data. "
                f"First missing:{preview(missing)}"
            )
        return rows

    def get(self, texts: Sequence[str]) -> Tensor:
        """Embeddings of `texts`: fp32 (n, dim). Raises as `rows` does."""
        return self.read(self.rows(texts))

    def read(self, rows: npt.ArrayLike) -> Tensor:
        """Embeddings at `rows`: fp32 (n, dim).

        Raises:
            IndexError: a row is not in [0, len(self)).
            StoreError: a shard cannot be read.
        """
        wanted = np.asarray(rows, dtype=np.int64)
        if wanted.ndim != 1:
            raise ValueError(f"rows: expected one dimension, got shape {wanted.shape}")
        out = torch.empty(len(wanted), self.dim)
        if not len(wanted):
            return out
        if wanted.min() < 0 or wanted.max() >= len(self):
            raise IndexError(f"rows from {wanted.min()} to {wanted.max()}; the store has {len(self)}")
        shard_of = np.searchsorted(self._starts, wanted, side="right") - 1
        # ascending rows inside a shard: the disk is read forwards
        order = np.lexsort((wanted, shard_of))
        for group in np.split(order, np.flatnonzero(np.diff(shard_of[order])) + 1):
            number = int(shard_of[group[0]])
            tensors = self._tensors(number)
            local = wanted[group] - self._starts[number]
            scales = tensors["scales"][local] if "scales" in tensors else None
            out[torch.from_numpy(group)] = decode_rows(tensors["embeddings"][local], scales, self.dtype)
        return out

    def check_fingerprint(self, expected: Mapping[str, Any]) -> None:
        """Make sure that the encoder behind this store is the expected one.

        Raises:
            StoreError: says which entries differ.
        """
        if difference := fingerprint_difference(self.fingerprint, expected):
            raise StoreError(
                f"the embedding store {self.path} was made by another encoder than expected:\n  "
                + "\n  ".join(difference)
                + "\nUse the store made with that LLM, or embed the captions again into a new directory."
            )

    def verify(self) -> list[str]:
        """Read every byte and compare checksums; names of the damaged shards."""
        return [entry.file for entry in self._shards if check_shard(self.path, entry, self.dim, self.dtype)]

    def _tensors(self, number: int) -> dict[str, npt.NDArray[Any]]:
        if number not in self._maps:
            entry = self._shards[number]
            try:
                tensors = map_tensors(self.path / entry.file, expected_bytes=entry.bytes)
            except StoreError as problem:
                raise StoreError(
                    f"{problem}. Run `llm2clip embed` again with the same settings: it drops the damaged "
                    "shard and computes its captions anew."
                ) from None
            specs = shard_specs(entry.rows, self.dim, self.dtype)
            if {name: tensor.shape for name, tensor in tensors.items()} != {
                n: s.shape for n, s in specs.items()
            }:
                raise StoreError(
                    f"{self.path / entry.file} does not hold the tensors that index.json promises"
                )
            self._maps[number] = tensors
        return self._maps[number]


@dataclass(frozen=True)
class StoreReport:
    """What `verify_store` found."""

    path: Path
    rows: int
    shards: int
    bytes: int
    complete: bool
    damaged: dict[str, str] = field(default_factory=dict)  # file -> what is wrong with it
    stray: list[str] = field(default_factory=list)  # files of an interrupted write, not part of the store
    duplicates: int = 0

    @property
    def ok(self) -> bool:
        """True when nothing is damaged or doubled."""
        return not self.damaged and not self.duplicates

    def __str__(self) -> str:
        lines = [
            f"{self.path}: {self.rows} captions in {self.shards} shards, {self.bytes / 2**20:.1f} MiB, "
            + ("complete" if self.complete else "unfinished")
        ]
        lines += [f"  damaged: {file}: {reason}" for file, reason in self.damaged.items()]
        lines += [f"  left over from an interrupted write, ignored: {name}" for name in self.stray]
        if self.duplicates:
            lines.append(f"  {self.duplicates} captions are stored twice")
        lines.append(
            "  all checksums agree"
            if self.ok
            else "  repair it by running `llm2clip embed` again with verify=true"
        )
        return "\n".join(lines)


def verify_store(path: str | os.PathLike[str], *, checksums: bool = True) -> StoreReport:
    """Check every shard of the store at `path`: presence, size, header and (unless told not to) SHA-256.

    Raises:
        StoreError: there is no store at `path` or its index is damaged.
    """
    root = Path(path)
    index = StoreIndex.load(root)
    damaged: dict[str, str] = {}
    digests = []
    for entry in index.shards:
        if problem := check_shard(root, entry, index.dim, index.dtype, checksum=checksums):
            damaged[entry.file] = problem
        else:
            digests.append(as_digests(map_tensors(root / entry.file)["digests"]))
    known = np.concatenate(digests) if digests else np.empty((0, 2), np.uint64)
    return StoreReport(
        path=root,
        rows=index.rows,
        shards=len(index.shards),
        bytes=sum(entry.bytes for entry in index.shards),
        complete=index.complete,
        damaged=damaged,
        stray=[file.name for file in stray_files(root, index)],
        duplicates=len(known) - len(np.unique(known, axis=0)),
    )


def repair_store(path: str | os.PathLike[str], *, checksums: bool = True) -> StoreReport:
    """Drop the damaged shards, and only those, so that `llm2clip embed` computes them again.

    Returns:
        The report of what was found before the repair.
    """
    report = verify_store(path, checksums=checksums)
    if report.damaged:
        drop_shards(report.path, set(report.damaged))
    return report
