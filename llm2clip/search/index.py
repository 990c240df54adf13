"""Features on disk that are searched exactly: built once, added to when there are more, never scanned twice.

The index is an embedding store (docs/embedding-store.md) addressed by what changes with an item: the path, size and
time of an image file, the text of a caption. So a start computes what is new or changed, a kill loses one commit, a
damaged file is dropped and computed again, and items that are gone are left out without rewriting anything.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llm2clip.data.store import EmbeddingStore, StoreWriter, repair_store
from llm2clip.data.store_format import INDEX_NAME, StoreIndex, fingerprint_difference
from llm2clip.data.store_lookup import Digests
from llm2clip.errors import StoreError
from llm2clip.progress import Progress
from llm2clip.settings import StoreDtype
from llm2clip_kernels.similarity_topk.op import MAX_K, SimilarityTopK

_CHUNK_ROWS = 1 << 16

# numbers of items -> (numbers, features) of some of them after the other; what cannot be computed is left out
Compute = Callable[[Sequence[int]], Iterator[tuple[Sequence[int], Tensor]]]


@dataclass(frozen=True)
class Found:
    """The best items for some queries.

    Attributes:
        scores: (queries, k) fp32 cosine similarities, best first, -inf where there are fewer items.
        items: (queries, k) int64 numbers of the items, -1 there.
    """

    scores: Tensor
    items: Tensor


class FeatureIndex:
    """Unit-norm features of items, searched exactly.

    Args:
        store: the features.
        rows: row of each item in the store, -1 for items that could not be computed: (items,) int64.
        resident_bytes: features that take up to so much as fp32 are kept in memory.

    Attributes:
        items: numbers of the items that can be found: (n,) int64.
    """

    def __init__(
        self, store: EmbeddingStore, rows: npt.NDArray[np.int64], *, resident_bytes: int = 2 << 30
    ) -> None:
        self.dim = store.dim
        self._store = store
        self.items: npt.NDArray[np.int64] = np.flatnonzero(rows >= 0)
        self._rows = rows[self.items]
        self._resident: Tensor | None = None
        if len(self) * self.dim * 4 <= resident_bytes:
            self._resident = torch.cat([torch.empty(0, self.dim), *self._chunks()])

    def __len__(self) -> int:
        return len(self.items)

    def features(self, places: npt.NDArray[np.int64]) -> Tensor:
        """Features at `places` of `items`: (n, dim) fp32 of unit norm."""
        if self._resident is not None:
            return self._resident[torch.from_numpy(places)]
        return _unit(self._store.read(self._rows[places]))

    def feature_of(self, item: int) -> Tensor | None:
        """Feature (1, dim) of an item; None where it has none."""
        place = int(np.searchsorted(self.items, item))
        if place == len(self.items) or self.items[place] != item:
            return None
        return self.features(np.array([place]))

    def digest(self) -> str:
        """Hash of which rows of the store are found, in which order."""
        return hashlib.blake2b(self._rows.tobytes(), digest_size=16).hexdigest()

    def search(self, queries: Tensor, k: int) -> Found:
        """The k best items of every query, exactly; equal scores go by the lower number.

        Args:
            queries: (n, dim) fp32, any norm.
            k: 1 to 64.
        """
        if not len(self):
            nothing = torch.full((len(queries), k), -1, dtype=torch.int64)
            return Found(torch.full((len(queries), k), -torch.inf), nothing)
        best = SimilarityTopK(_unit(queries), min(k, MAX_K))
        for chunk in self._chunks() if self._resident is None else [self._resident]:
            best.update(chunk)
        scores, places = best.result()
        items = torch.from_numpy(self.items)[places.clamp(min=0)]
        return Found(scores, torch.where(places < 0, places, items))

    def _chunks(self) -> Iterator[Tensor]:
        for start in range(0, len(self), _CHUNK_ROWS):
            yield _unit(self._store.read(self._rows[start : start + _CHUNK_ROWS]))


def _unit(values: Tensor) -> Tensor:
    # stored precisions round the norm, too
    return torch.nn.functional.normalize(values, dim=1)


def build_index(
    path: Path,
    addresses: Digests,
    compute: Compute,
    *,
    dim: int,
    fingerprint: dict[str, Any],
    title: str,
    dtype: StoreDtype = "fp16",
    commit_rows: int = 1024,
    resident_bytes: int = 2 << 30,
) -> FeatureIndex:
    """Compute what the index at `path` lacks, and open it.

    Args:
        path: directory of the index.
        addresses: address of each item (items, 2); items with the same one share a feature.
        compute: features of the items that are missing, of any norm; called once.
        dim: of a feature.
        fingerprint: everything that features depend on besides the item.
        title: what is indexed, for the progress.
        dtype: stored precision.
        commit_rows: items between two commits.
        resident_bytes: as in `FeatureIndex`.

    Raises:
        StoreError: the index was made with another model or precision, or another process writes to it.
        UserError: no space is left, or the place cannot be written.
    """
    if (path / INDEX_NAME).exists():
        _require_same_maker(path, {"dim": dim, "dtype": dtype, **fingerprint})
        for file, damage in repair_store(path, checksums=True).damaged.items():
            print(f"{path}: {file} is damaged ({damage.reason}); what is lost is made again", file=sys.stderr)
    with StoreWriter(path, dim=dim, dtype=dtype, fingerprint=fingerprint, commit_rows=commit_rows) as writer:
        known = EmbeddingStore.open(path)
        missing = _first_of_each(addresses, np.flatnonzero(known.find_digests(addresses) < 0))
        finished = known.complete
        del known
        if len(missing):
            done = len(addresses) - len(missing)
            with Progress(len(addresses), f"indexing {title}", title, initial=done) as shown:
                for numbers, features in compute(missing.tolist()):
                    writer.add_digests(addresses[list(numbers)], _unit(features.float()))
                    shown.update(len(numbers))
        if len(missing) or not finished:  # what was killed after its last commit is still to be merged
            writer.finish()
    store = EmbeddingStore.open(path)
    return FeatureIndex(store, store.find_digests(addresses), resident_bytes=resident_bytes)


def _require_same_maker(path: Path, expected: dict[str, Any]) -> None:
    index = StoreIndex.load(path)
    stored = {"dim": index.dim, "dtype": index.dtype, **index.fingerprint}
    if difference := fingerprint_difference(stored, expected):
        raise StoreError(
            f"the index {path} was made by another model or with other settings:\n  "
            + "\n  ".join(difference)
            + "\nGive another directory (index=DIR), or remove this one to build it again."
        )


def _first_of_each(addresses: Digests, items: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Of the items that share an address, the first: (n,), in order."""
    keys = np.ascontiguousarray(addresses[items]).view("V16")[:, 0]
    return items[np.sort(np.unique(keys, return_index=True)[1])]
