"""Caption embeddings on disk, addressed by the caption's text.

A store is written once by `StoreWriter` and read through memory maps by `EmbeddingStore`: embeddings and the table of
addresses stay on disk until they are asked for, and all processes of a machine share what was read.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llm2clip.data.store_check import StoreReport, check_shard, verify_store
from llm2clip.data.store_format import StoreIndex, check_fingerprint, prefix_fingerprint, preview
from llm2clip.data.store_lookup import caption_digest, digest_array, open_lookup
from llm2clip.data.store_repair import repair_store
from llm2clip.data.store_rows import open_rows
from llm2clip.data.store_writer import StoreWriter
from llm2clip.errors import StoreError
from llm2clip.settings import StoreDtype

__all__ = ["EmbeddingStore", "StoreReport", "StoreWriter", "caption_digest", "repair_store", "verify_store"]

_OPEN_ATTEMPTS = 20  # a writer may merge parts between our reading of the index and of the parts


class EmbeddingStore:
    """Embeddings of captions; open it with `EmbeddingStore.open(path)`.

    What was there when it was opened stays readable while another process adds captions. It does not see those.

    Attributes:
        path: directory of the store.
        dim: dimension of an embedding, as it is read.
        stored_dim: dimension on disk.
        dtype: stored precision; what is read is always fp32.
        fingerprint: identity of the encoder that made the embeddings.
        complete: False while `llm2clip embed` has not finished.
    """

    def __init__(self, path: Path, index: StoreIndex, dim: int | None = None) -> None:
        self.path = path
        self.dim: int = index.dim if dim is None else dim
        self.stored_dim: int = index.dim
        self.dtype: StoreDtype = index.dtype
        self.fingerprint: dict[str, Any] = prefix_fingerprint(index.fingerprint, self.dim)
        self.complete: bool = index.complete
        self._generation = index.generation
        self._shards = index.shards
        self._count = index.rows
        self._source = open_rows(index.dim, index.dtype)
        for entry in index.shards:
            self._source.add(path / entry.file, entry)
        self._lookup = open_lookup(path, index)

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, dim: int | None = None) -> EmbeddingStore:
        """Open the store in directory `path`.

        Args:
            path: the directory.
            dim: read only the first values of each embedding, as Matryoshka training allows; None: all.

        Raises:
            StoreError: there is no store, a shard is missing, cut or has no valid header, or `dim` is too large.
        """
        root = Path(path)
        index = StoreIndex.load(root)
        if dim is not None and not 1 <= dim <= index.dim:
            raise StoreError(
                f"{root} holds embeddings of dimension {index.dim}; the first {dim} were asked for"
            )
        for _ in range(_OPEN_ATTEMPTS):
            try:
                return cls(root, index, dim)
            except StoreError as problem:
                before, index = index, StoreIndex.load(root)
                if index == before:
                    raise StoreError(
                        f"{problem}. Run `llm2clip store repair {root}` with the settings of `llm2clip embed`: it "
                        "drops what is damaged and computes its captions anew."
                    ) from None
        return cls(root, index, dim)

    def __len__(self) -> int:
        return self._count

    def __repr__(self) -> str:
        state = "" if self.complete else ", unfinished"
        return (
            f"EmbeddingStore({str(self.path)!r}, {len(self)} captions, dim {self.dim}, {self.dtype}{state})"
        )

    def __getstate__(self) -> dict[str, Any]:
        # another process maps the files again by itself; they may have been merged since, which moves no row
        return {"path": self.path, "dim": self.dim, "count": self._count, "generation": self._generation}

    def __setstate__(self, state: dict[str, Any]) -> None:
        again = EmbeddingStore.open(state["path"], dim=state["dim"])
        if again._generation != state["generation"] or len(again) < state["count"]:
            raise StoreError(f"{state['path']} was repaired while it was in use; open it again")
        self.__dict__.update(again.__dict__)

    def find(self, texts: Sequence[str]) -> npt.NDArray[np.int64]:
        """Row of each caption (n,), -1 where the store does not hold it."""
        return self._lookup.find(digest_array(texts))

    def find_digests(self, digests: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
        """Row of each address (n, 2), -1 where the store does not hold it."""
        return self._lookup.find(digests)

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

    def get(self, texts: Sequence[str], *, out: Tensor | None = None) -> Tensor:
        """Embeddings of `texts`: fp32 (n, dim). `out` and errors as in `read` and `rows`."""
        return self.read(self.rows(texts), out=out)

    def read(self, rows: npt.ArrayLike, *, out: Tensor | None = None) -> Tensor:
        """Embeddings at `rows`: fp32 (n, dim).

        Args:
            rows: (n,) row numbers.
            out: contiguous fp32 (n, dim) on the CPU to write to, pinned if you like. Without it memory is allocated,
                which takes longer than reading rows that are in memory.

        Raises:
            IndexError: a row is not in [0, len(self)).
            ValueError: `rows` or `out` has another shape.
        """
        wanted = np.ascontiguousarray(rows, dtype=np.int64)
        if wanted.ndim != 1:
            raise ValueError(f"rows: expected one dimension, got shape {wanted.shape}")
        shape = (len(wanted), self.dim)
        if out is None:
            # not torch.empty: NumPy asks for huge pages, which saves most of the page faults
            out = torch.from_numpy(np.empty(shape, np.float32))
        elif out.shape != shape or out.dtype != torch.float32 or not out.is_contiguous() or out.is_cuda:
            raise ValueError(
                f"out: expected contiguous float32 of shape {shape} on the CPU, got {out.dtype} of shape "
                f"{tuple(out.shape)} on {out.device}"
            )
        if not len(wanted):
            return out
        if wanted.min() < 0 or wanted.max() >= len(self):
            raise IndexError(f"rows from {wanted.min()} to {wanted.max()}; the store has {len(self)}")
        self._source.read(wanted, out.numpy())
        return out

    def check_fingerprint(self, expected: Mapping[str, Any]) -> None:
        """Make sure that the encoder behind this store is the expected one.

        Raises:
            StoreError: says which entries differ.
        """
        check_fingerprint(self.path, self.fingerprint, expected)

    def verify(self) -> list[str]:
        """Read every byte and compare checksums; names of the damaged shards."""
        return [
            entry.file for entry in self._shards if check_shard(self.path, entry, self.stored_dim, self.dtype)
        ]
