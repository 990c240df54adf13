"""From captions to rows of an embedding store: addresses, and tables sorted by address.

A table costs 20.5 bytes a caption. A finished store has one as a file, which every reader maps and all of
them share; only captions that were added since then are kept in memory.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from llm2clip.data.store_format import DIGEST_BYTES, StoreIndex
from llm2clip.data.tensorfile import TensorSpec, map_tensors, write_tensors
from llm2clip.errors import StoreError

_host: Any
try:
    _host = importlib.import_module("llm2clip._host")
except ImportError:  # built without a C++ compiler
    _host = None

MAX_ROWS = 2**32 - 1  # row numbers are stored in 32 bits

Digests = npt.NDArray[np.uint64]  # (n, 2): the two halves of each 128-bit address

_BUCKET_ROWS = 8  # addresses that share their upper bits, on average
_RECENT = 65536  # new addresses in a dictionary before they are sorted in


def caption_digest(text: str) -> bytes:
    """128-bit BLAKE2b of the caption's UTF-8 text: its address in every store.

    At 1e9 captions the chance that any two share an address is below 1e-20.
    """
    # JSON may carry half a surrogate pair, which strict UTF-8 refuses
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=DIGEST_BYTES).digest()


def digest_array(texts: Sequence[str]) -> Digests:
    """Addresses of `texts` (n, 2), by the native hash where it is built."""
    if _host is None:
        return digest_array_python(texts)
    digests: Digests = _host.caption_digests(texts, torch.get_num_threads())
    return digests


def digest_array_python(texts: Iterable[str]) -> Digests:
    """The same in Python; the definition the native hash is tested against."""
    return as_digests(np.frombuffer(b"".join(map(caption_digest, texts)), dtype=np.uint8))


def as_digests(raw: npt.NDArray[np.uint8]) -> Digests:
    """View bytes (n * 16,) or (n, 16) as addresses (n, 2)."""
    return np.ascontiguousarray(raw).reshape(-1).view("<u8").reshape(-1, 2)


def different(digests: Sequence[Digests]) -> Digests:
    """The addresses of several arrays (n_i, 2), each once and in order."""
    joined = np.concatenate(digests) if digests else np.empty((0, 2), np.uint64)
    joined = joined[np.lexsort((joined[:, 1], joined[:, 0]))]
    new = np.ones(len(joined), bool)
    new[1:] = (joined[1:] != joined[:-1]).any(axis=1)
    return joined[new]


def count_doubles(digests: Digests) -> int:
    """How many of the addresses (n, 2) are there already."""
    order = np.argsort(digests[:, 0])
    high = digests[order, 0]
    same = np.flatnonzero(high[1:] == high[:-1])
    rows = order[np.unique(np.concatenate([same, same + 1]))]
    return len(rows) - len(different([digests[rows]]))


@dataclass(frozen=True, slots=True)
class AddressTable:
    """Rows of addresses, sorted by the address's first half.

    Attributes:
        high, low: the halves of each address (n,) uint64.
        rows: row of each address (n,) uint32.
        buckets: first place of every value of an address's upper bits, and n: (2^b + 1,) uint32.
    """

    high: npt.NDArray[np.uint64]
    low: npt.NDArray[np.uint64]
    rows: npt.NDArray[np.uint32]
    buckets: npt.NDArray[np.uint32]

    @classmethod
    def build(cls, digests: Digests, rows: npt.NDArray[np.integer[Any]]) -> AddressTable:
        """Sort different addresses (n, 2) with their rows (n,)."""
        order = np.argsort(digests[:, 0])
        high = digests[:, 0][order]
        return cls(high, digests[:, 1][order], rows[order].astype(np.uint32), _buckets(high))

    def __len__(self) -> int:
        return len(self.high)

    def digests(self) -> Digests:
        """The addresses in order (n, 2)."""
        return np.stack([self.high, self.low], axis=1)

    def find(self, digests: Digests) -> npt.NDArray[np.int64]:
        """Row of each address (n,), -1 where it is not here; native where it is built."""
        if _host is None:
            return self.find_python(digests)
        found: npt.NDArray[np.int64] = _host.find_rows(
            digests, self.high, self.low, self.rows, self.buckets, torch.get_num_threads()
        )
        return found

    def find_python(self, digests: Digests) -> npt.NDArray[np.int64]:
        """The same in NumPy; the definition the native search is tested against."""
        found = np.full(len(digests), -1, np.int64)
        if not len(self) or not len(digests):
            return found
        place = np.searchsorted(self.high, digests[:, 0])
        clipped = np.minimum(place, len(self) - 1)
        same_high = self.high[clipped] == digests[:, 0]
        same = same_high & (self.low[clipped] == digests[:, 1])
        found[same] = self.rows[clipped[same]]
        # addresses with equal first halves stand in any order: look at all of them
        for query in np.flatnonzero(same_high & ~same):
            stop = np.searchsorted(self.high, digests[query, 0], side="right")
            equal = np.flatnonzero(self.low[place[query] : stop] == digests[query, 1])
            if len(equal):
                found[query] = self.rows[place[query] + equal[0]]
        return found

    def save(self, path: Path) -> tuple[str, int]:
        """Write the table atomically; returns (SHA-256, bytes) of the file."""
        arrays: dict[str, npt.NDArray[Any]] = {
            "high": self.high, "low": self.low, "rows": self.rows, "buckets": self.buckets
        }  # fmt: skip
        specs = {name: TensorSpec(_TYPES[name], array.shape) for name, array in arrays.items()}
        return write_tensors(path, specs, {name: [array] for name, array in arrays.items()})

    @classmethod
    def load(cls, path: Path, *, rows: int, expected_bytes: int) -> AddressTable:
        """Map the table of `rows` captions at `path`.

        Raises:
            StoreError: the file is missing, cut, or holds something else.
        """
        tensors = map_tensors(path, expected_bytes=expected_bytes)
        if set(tensors) != set(_TYPES) or any(len(tensors[n]) != rows for n in ("high", "low", "rows")):
            raise StoreError(
                f"{path} does not hold the addresses of {rows} captions that index.json promises"
            )
        return cls(**tensors)


_TYPES = {"high": "U64", "low": "U64", "rows": "U32", "buckets": "U32"}


def _buckets(high: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint32]:
    bits = max(0, (len(high) // _BUCKET_ROWS).bit_length() - 1)
    counts = (
        np.bincount((high >> np.uint64(64 - bits)).astype(np.int64), minlength=1 << bits)
        if bits
        else np.array([len(high)])
    )
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.uint32)


class DigestIndex:
    """Row number of every stored address, growing.

    Args:
        base: table of the captions that were there before; it is never copied.
        own: table of further ones, which is merged with those to come.
    """

    def __init__(self, base: AddressTable | None = None, own: AddressTable | None = None) -> None:
        self._base = base
        self._own = own
        self._recent: dict[bytes, int] = {}

    def __len__(self) -> int:
        return sum(len(table) for table in self._tables()) + len(self._recent)

    def _tables(self) -> list[AddressTable]:
        return [table for table in (self._base, self._own) if table is not None]

    def extend(self, digests: Digests, first_row: int) -> None:
        """Register addresses that are not in the index yet; they own the rows from `first_row` on.

        Raises:
            StoreError: the store would hold more rows than row numbers can say.
        """
        if first_row + len(digests) > MAX_ROWS:
            raise StoreError(f"a store holds at most {MAX_ROWS} captions; make a second one for the rest")
        if len(digests) > _RECENT:
            self._merge(digests, np.arange(first_row, first_row + len(digests)))
            return
        self._recent.update((row.tobytes(), first_row + offset) for offset, row in enumerate(digests))
        # a dictionary entry takes ten times the memory of a sorted one
        if len(self._recent) > max(_RECENT, len(self._own or ()) // 16):
            recent, self._recent = self._recent, {}
            keys = as_digests(np.frombuffer(b"".join(recent), dtype=np.uint8))
            self._merge(keys, np.fromiter(recent.values(), np.int64, len(recent)))

    def _merge(self, digests: Digests, rows: npt.NDArray[np.int64]) -> None:
        if self._own is not None:
            digests = np.concatenate([self._own.digests(), digests])
            rows = np.concatenate([self._own.rows, rows])
        self._own = AddressTable.build(digests, rows)

    def find(self, digests: Digests) -> npt.NDArray[np.int64]:
        """Row of each address (n,), -1 where it is not stored."""
        tables = self._tables()
        rows = tables[0].find(digests) if tables else np.full(len(digests), -1, np.int64)
        for table in tables[1:]:
            unknown = np.flatnonzero(rows < 0)
            rows[unknown] = table.find(np.ascontiguousarray(digests[unknown]))
        if self._recent:
            for query in np.flatnonzero(rows < 0):
                rows[query] = self._recent.get(digests[query].tobytes(), -1)
        return rows

    def table(self) -> AddressTable:
        """Everything in one sorted table."""
        if not self._recent and len(self._tables()) == 1:
            return self._tables()[0]
        keys = as_digests(np.frombuffer(b"".join(self._recent), dtype=np.uint8))
        recent = np.fromiter(self._recent.values(), np.int64, len(self._recent))
        tables = self._tables()
        return AddressTable.build(
            np.concatenate([*(table.digests() for table in tables), keys]),
            np.concatenate([*(table.rows for table in tables), recent]),
        )

    @property
    def unsorted(self) -> int:
        """Addresses that are in memory and not in `base`."""
        return len(self) - len(self._base or ())


def open_lookup(root: Path, index: StoreIndex) -> DigestIndex:
    """The rows of every address: the table on disk, and in memory what was added since it was written.

    Raises:
        StoreError: a shard or the table is missing or cut.
    """
    base = None
    if index.lookup is not None:
        entry = index.lookup
        base = AddressTable.load(root / entry.file, rows=entry.rows, expected_bytes=entry.bytes)
    known = 0 if base is None else len(base)
    late = [
        as_digests(
            map_tensors(root / entry.file, expected_bytes=entry.bytes)["digests"][max(0, known - start) :]
        )
        for entry, start in zip(index.shards, index.starts().tolist(), strict=False)
        if start + entry.rows > known
    ]
    own = AddressTable.build(np.concatenate(late), np.arange(known, index.rows)) if late else None
    return DigestIndex(base, own)
