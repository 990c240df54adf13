"""What an embedding store looks like on disk: caption addresses, number formats, the index.

`docs/embedding-store.md` describes the directory; `store` reads it and `store_writer` writes it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llm2clip.data.tensorfile import TensorSpec
from llm2clip.errors import StoreError
from llm2clip.files import read_json, write_json
from llm2clip.settings import StoreDtype

FORMAT, VERSION = "llm2clip-embeddings", 1
INDEX_NAME = "index.json"
DIGEST_BYTES = 16

Digests = npt.NDArray[np.uint64]  # (n, 2): the two halves of each 128-bit address

_SAFETENSORS = {"fp32": "F32", "bf16": "BF16", "fp16": "F16", "int8": "I8"}


def caption_digest(text: str) -> bytes:
    """128-bit BLAKE2b of the caption's UTF-8 text: its address in every store.

    At 1e9 captions the chance that any two share an address is below 1e-20.
    """
    # JSON may carry half a surrogate pair, which strict UTF-8 refuses
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=DIGEST_BYTES).digest()


def digest_array(texts: Iterable[str]) -> Digests:
    """Addresses of `texts` as an array (n, 2) of uint64."""
    return as_digests(np.frombuffer(b"".join(map(caption_digest, texts)), dtype=np.uint8))


def as_digests(raw: npt.NDArray[np.uint8]) -> Digests:
    """View bytes (n * 16,) or (n, 16) as addresses (n, 2)."""
    return np.ascontiguousarray(raw).reshape(-1).view("<u8").reshape(-1, 2)


class DigestIndex:
    """Row number of every stored address.

    Most addresses lie in sorted arrays (24 bytes each); new ones gather in a dictionary that is merged
    when it grows, so that both a finished store and a growing one of tens of millions of captions
    answer quickly.
    """

    def __init__(self) -> None:
        self._high = self._low = np.empty(0, np.uint64)
        self._row = np.empty(0, np.int64)
        self._recent: dict[tuple[int, int], int] = {}

    def __len__(self) -> int:
        return len(self._row) + len(self._recent)

    def extend(self, digests: Digests, first_row: int) -> None:
        """Register addresses that are not in the index yet; they own the rows from `first_row` on."""
        if len(digests) > 65536:
            self._merge(digests, np.arange(first_row, first_row + len(digests), dtype=np.int64))
            return
        pairs = zip(digests[:, 0].tolist(), digests[:, 1].tolist(), strict=True)
        self._recent.update((pair, first_row + offset) for offset, pair in enumerate(pairs))
        if len(self._recent) > max(65536, len(self._row) // 4):
            recent, self._recent = self._recent, {}
            keys = np.array(list(recent), dtype=np.uint64)
            self._merge(keys, np.fromiter(recent.values(), np.int64, len(recent)))

    def _merge(self, digests: Digests, rows: npt.NDArray[np.int64]) -> None:
        high = np.concatenate([self._high, digests[:, 0]])
        low = np.concatenate([self._low, digests[:, 1]])
        row = np.concatenate([self._row, rows])
        order = np.lexsort((low, high))
        self._high, self._low, self._row = high[order], low[order], row[order]

    def find(self, digests: Digests) -> npt.NDArray[np.int64]:
        """Row of each address (n,), -1 where it is not stored."""
        rows = np.full(len(digests), -1, np.int64)
        if len(self._row) and len(digests):
            position = np.searchsorted(self._high, digests[:, 0])
            clipped = np.minimum(position, len(self._row) - 1)
            same_high = self._high[clipped] == digests[:, 0]
            same = same_high & (self._low[clipped] == digests[:, 1])
            rows[same] = self._row[clipped[same]]
            # two addresses with equal upper halves: search the lower half among those
            for query in np.flatnonzero(same_high & ~same):
                stop = np.searchsorted(self._high, digests[query, 0], side="right")
                start = position[query]
                offset = np.searchsorted(self._low[start:stop], digests[query, 1])
                if start + offset < stop and self._low[start + offset] == digests[query, 1]:
                    rows[query] = self._row[start + offset]
        if self._recent:
            for query in np.flatnonzero(rows < 0):
                rows[query] = self._recent.get((int(digests[query, 0]), int(digests[query, 1])), -1)
        return rows


def encode_rows(values: Tensor, dtype: StoreDtype) -> dict[str, npt.NDArray[Any]]:
    """Turn embeddings (n, dim) into the stored arrays.

    int8 rows have one fp32 scale each, max|row| / 127, so the error is at most half a scale.

    Raises:
        StoreError: a value is not finite, or too large for fp16.
    """
    values = values.detach().to("cpu", torch.float32).contiguous()
    if not bool(torch.isfinite(values).all()):
        row = int((~torch.isfinite(values).all(dim=1)).nonzero()[0])
        raise StoreError(
            f"embedding {row} of this batch has NaN or infinite values; nothing of it was stored"
        )
    if dtype == "fp32":
        return {"embeddings": values.numpy()}
    if dtype == "bf16":
        return {"embeddings": values.to(torch.bfloat16).view(torch.int16).numpy().view("<u2")}
    if dtype == "fp16":
        half = values.to(torch.float16)
        if not bool(torch.isfinite(half).all()):
            raise StoreError(
                f"an embedding value of {values.abs().max():.4g} does not fit fp16 (largest: 65504); "
                "set dtype to bf16 or fp32"
            )
        return {"embeddings": half.numpy()}
    scales = values.abs().amax(dim=1) / 127 if values.shape[1] else torch.zeros(len(values))
    divisor = torch.where(scales > 0, scales, 1.0)
    quantised = (values / divisor[:, None]).round().clamp(-127, 127).to(torch.int8)
    return {"scales": scales.numpy(), "embeddings": quantised.numpy()}


def decode_rows(
    embeddings: npt.NDArray[Any], scales: npt.NDArray[np.float32] | None, dtype: StoreDtype
) -> Tensor:
    """Inverse of `encode_rows` up to rounding: fp32 (n, dim). The arrays must be writable copies."""
    if dtype == "bf16":
        return torch.from_numpy(embeddings.view(np.int16)).view(torch.bfloat16).float()
    values = torch.from_numpy(embeddings).float()
    if scales is not None:
        values *= torch.from_numpy(scales)[:, None]
    return values


def shard_specs(rows: int, dim: int, dtype: StoreDtype) -> dict[str, TensorSpec]:
    """Tensors of a shard file, in file order."""
    scales = {"scales": TensorSpec("F32", (rows,))} if dtype == "int8" else {}
    return scales | {
        "embeddings": TensorSpec(_SAFETENSORS[dtype], (rows, dim)),
        "digests": TensorSpec("U8", (rows, DIGEST_BYTES)),
    }


@dataclass(frozen=True, slots=True)
class ShardEntry:
    """One file of the store."""

    file: str
    rows: int
    bytes: int
    sha256: str


@dataclass(slots=True)
class StoreIndex:
    """Content of index.json: what belongs to the store, and who made it."""

    dim: int
    dtype: StoreDtype
    fingerprint: dict[str, Any]
    complete: bool = False
    shards: list[ShardEntry] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """Embeddings in all shards."""
        return sum(entry.rows for entry in self.shards)

    def starts(self) -> npt.NDArray[np.int64]:
        """First row of each shard and, last, the number of rows: (shards + 1,)."""
        return np.cumsum([0, *(entry.rows for entry in self.shards)], dtype=np.int64)

    def save(self, root: Path) -> None:
        """Write index.json atomically: the instant at which a change of the store happens."""
        content = {"format": FORMAT, "version": VERSION, "rows": self.rows, **asdict(self)}
        write_json(root / INDEX_NAME, content)

    @classmethod
    def load(cls, root: Path) -> StoreIndex:
        """Read index.json.

        Raises:
            StoreError: it is missing, damaged, or of another version.
        """
        path = root / INDEX_NAME
        if not path.is_file():
            raise StoreError(
                f"{root} is not an embedding store: it has no {INDEX_NAME}. "
                "Make a store with `llm2clip embed` and give its directory."
            )
        content = read_json(path, StoreError)
        try:
            if content["format"] != FORMAT:
                raise StoreError(f"{path} describes {content['format']!r}, expected {FORMAT!r}")
            if content["version"] != VERSION:
                raise StoreError(
                    f"{path} has version {content['version']}, this program reads version {VERSION}; "
                    "embed the captions again or use the program that made it"
                )
            if content["dtype"] not in get_args(StoreDtype):
                raise StoreError(
                    f"{path}: dtype {content['dtype']!r} is none of {', '.join(get_args(StoreDtype))}"
                )
            shards = [ShardEntry(**entry) for entry in content["shards"]]
            return cls(
                int(content["dim"]),
                content["dtype"],
                dict(content["fingerprint"]),
                bool(content["complete"]),
                shards,
            )
        except (KeyError, TypeError, ValueError) as problem:
            if isinstance(problem, StoreError):
                raise
            raise StoreError(f"{path} is damaged: {problem!r}") from None


def fingerprint_difference(stored: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """Lines `name: stored ..., expected ...` for every entry that differs."""
    return [
        f"{name}: stored {stored.get(name, 'nothing')!r}, expected {expected.get(name, 'nothing')!r}"
        for name in sorted({*stored, *expected})
        if stored.get(name) != expected.get(name)
    ]


def preview(texts: Sequence[str], count: int = 10, width: int = 80) -> str:
    """The first `count` texts, quoted and shortened, one a line."""
    lines = [repr(text if len(text) <= width else text[: width - 1] + "…") for text in texts[:count]]
    return "\n  ".join(["", *lines])
