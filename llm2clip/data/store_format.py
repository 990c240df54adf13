"""What an embedding store looks like on disk: number formats, tensors of a shard, the index.

`docs/embedding-store.md` describes the directory; `store` reads it and `store_writer` writes it.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
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

FORMAT, VERSION = "llm2clip-embeddings", 2
_READABLE = (1, 2)  # version 1 has no checks of blocks and no lookup table
INDEX_NAME = "index.json"
DIGEST_BYTES = 16
BLOCK_ROWS = 1024
"""Rows that share a checksum inside a shard: damage is located, and repaired, to so many."""

SCALED: tuple[StoreDtype, ...] = ("int8", "fp8")
"""Formats with one fp32 scale a row."""

_FILE = re.compile(r"(part|shard|lookup)-\d{1,18}\.safetensors")
_SAFETENSORS = {"fp32": "F32", "bf16": "BF16", "fp16": "F16", "int8": "I8", "fp8": "F8_E4M3"}
_LARGEST = {"int8": 127.0, "fp8": 448.0}


def encode_rows(values: Tensor, dtype: StoreDtype) -> dict[str, npt.NDArray[Any]]:
    """Turn embeddings (n, dim) into the stored arrays.

    int8 and fp8 (e4m3) rows have one fp32 scale each, which takes the row's largest value to 127 or 448. The
    error is at most half a scale for int8, and at most 1/16 of each value, or 2⁻¹⁰ scales, for fp8.

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
    scales = values.abs().amax(dim=1) / _LARGEST[dtype] if values.shape[1] else torch.zeros(len(values))
    scaled = values / torch.where(scales > 0, scales, 1.0)[:, None]
    largest = _LARGEST[dtype]
    if dtype == "int8":
        stored = scaled.round().clamp(-largest, largest).to(torch.int8).numpy()
    else:
        stored = scaled.clamp(-largest, largest).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    return {"scales": scales.numpy(), "embeddings": stored}


def decode_rows(
    embeddings: npt.NDArray[Any], scales: npt.NDArray[np.float32] | None, dtype: StoreDtype
) -> Tensor:
    """Inverse of `encode_rows` up to rounding: fp32 (n, dim). The arrays must be writable copies."""
    if dtype == "bf16":
        return torch.from_numpy(embeddings.view(np.int16)).view(torch.bfloat16).float()
    values = torch.from_numpy(embeddings)
    values = values.view(torch.float8_e4m3fn).float() if dtype == "fp8" else values.float()
    if scales is not None:
        values *= torch.from_numpy(scales)[:, None]
    return values


def shard_specs(rows: int, dim: int, dtype: StoreDtype) -> dict[str, TensorSpec]:
    """Tensors of a shard file, in file order."""
    scales = {"scales": TensorSpec("F32", (rows,))} if dtype in SCALED else {}
    return scales | {
        "embeddings": TensorSpec(_SAFETENSORS[dtype], (rows, dim)),
        "digests": TensorSpec("U8", (rows, DIGEST_BYTES)),
        "checks": TensorSpec("U32", (-(-rows // BLOCK_ROWS),)),
    }


LOOKUP_BYTES = 20.5
"""What a caption takes in the table of addresses: address, row, share of the buckets."""


def bytes_per_caption(dim: int, dtype: StoreDtype) -> float:
    """What a caption takes on disk: embedding, scale, address, its share of checksums and of the lookup table."""
    rows = BLOCK_ROWS
    return sum(spec.nbytes for spec in shard_specs(rows, dim, dtype).values()) / rows + LOOKUP_BYTES


class BlockChecks:
    """CRC-32 of every block of `BLOCK_ROWS` rows, over its part of each tensor in the order of the file.

    Attributes:
        values: (blocks,) uint32.
    """

    def __init__(self, rows: int) -> None:
        self.values = np.zeros(-(-rows // BLOCK_ROWS), np.uint32)

    def watch(self, chunks: Iterable[npt.NDArray[Any]]) -> Iterator[npt.NDArray[Any]]:
        """Pass on arrays of rows that follow each other, and take them into account."""
        row = 0
        for chunk in chunks:
            start = 0
            while start < len(chunk):
                block, inside = divmod(row + start, BLOCK_ROWS)
                stop = min(len(chunk), start + BLOCK_ROWS - inside)
                data = np.ascontiguousarray(chunk[start:stop]).reshape(-1).view(np.uint8).data
                self.values[block] = zlib.crc32(data, int(self.values[block]))
                start = stop
            row += len(chunk)
            yield chunk


def wrong_blocks(tensors: Mapping[str, npt.NDArray[Any]], rows: int) -> npt.NDArray[np.int64]:
    """Numbers of the blocks that differ from their checksums; all of them where there are none to compare."""
    if "checks" not in tensors:
        return np.arange(-(-rows // BLOCK_ROWS))
    checks = BlockChecks(rows)
    for name in ("scales", "embeddings", "digests"):
        if name in tensors:
            for _ in checks.watch([tensors[name]]):
                pass
    return np.flatnonzero(checks.values != tensors["checks"])


def not_finite_blocks(tensors: Mapping[str, npt.NDArray[Any]], dtype: StoreDtype) -> npt.NDArray[np.int64]:
    """Numbers of the blocks in which a value, or a row's scale, is NaN or infinite."""
    values = tensors["embeddings"]
    bad = np.zeros(len(values), bool)
    for start in range(0, len(values), BLOCK_ROWS):
        block = values[start : start + BLOCK_ROWS]
        if dtype == "bf16":
            wrong = (block & 0x7F80) == 0x7F80  # all bits of the exponent
        elif dtype == "fp8":
            wrong = (block & 0x7F) == 0x7F
        elif dtype == "int8":
            break
        else:
            wrong = ~np.isfinite(block)
        bad[start : start + BLOCK_ROWS] = wrong.any(axis=1)
    if "scales" in tensors:
        bad |= ~np.isfinite(tensors["scales"])
    return np.unique(np.flatnonzero(bad) // BLOCK_ROWS)


@dataclass(frozen=True, slots=True)
class ShardEntry:
    """One file of the store."""

    file: str
    rows: int
    bytes: int
    sha256: str

    def require_valid(self) -> None:
        """Raise ValueError for an entry that no store has: names become paths that a repair removes."""
        if not _FILE.fullmatch(self.file):
            raise ValueError(f"{self.file!r} is not the name of a file of a store")
        if any(type(number) is not int or number < 0 for number in (self.rows, self.bytes)):
            raise ValueError(f"{self.file} has {self.rows!r} rows and {self.bytes!r} bytes")
        if not isinstance(self.sha256, str):
            raise ValueError(f"{self.file} has no checksum")


@dataclass(frozen=True, slots=True)
class LookupEntry(ShardEntry):
    """The table of addresses of the first `rows` captions (see `store_lookup.AddressTable`)."""


@dataclass(slots=True)
class StoreIndex:
    """Content of index.json: what belongs to the store, and who made it.

    Attributes:
        dim, dtype: of the stored embeddings.
        fingerprint: identity of the encoder.
        complete: whether `llm2clip embed` came to its end.
        shards: files with embeddings, in the order of their rows.
        generation: how often rows got other numbers (by a repair); adding captions and merging parts leave them.
        serial: number of the next file. No name is ever used twice: a process that has read an older index must not
            find other rows under a name that it knows.
        lookup: table of addresses, if there is one.
    """

    dim: int
    dtype: StoreDtype
    fingerprint: dict[str, Any]
    complete: bool = False
    shards: list[ShardEntry] = field(default_factory=list)
    generation: int = 0
    serial: int = 0
    lookup: LookupEntry | None = None

    @property
    def rows(self) -> int:
        """Embeddings in all shards."""
        return sum(entry.rows for entry in self.shards)

    def starts(self) -> npt.NDArray[np.int64]:
        """First row of each shard and, last, the number of rows: (shards + 1,)."""
        return np.cumsum([0, *(entry.rows for entry in self.shards)], dtype=np.int64)

    def new_name(self, kind: str) -> str:
        """A file name that this store has never had."""
        # stores of version 1 count nothing: their numbers are in the names
        numbers = [int(entry.file.removesuffix(".safetensors").rpartition("-")[2]) for entry in self.shards]
        self.serial = max([self.serial, *(number + 1 for number in numbers)]) + 1
        return f"{kind}-{self.serial - 1:06d}.safetensors"

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
            if content["version"] not in _READABLE:
                raise StoreError(
                    f"{path} has version {content['version']}, this program reads up to version {VERSION}; "
                    "embed the captions again or use the program that made it"
                )
            if content["dtype"] not in get_args(StoreDtype):
                raise StoreError(
                    f"{path}: dtype {content['dtype']!r} is none of {', '.join(get_args(StoreDtype))}"
                )
            lookup, dim = content.get("lookup"), content["dim"]
            if type(dim) is not int or dim < 1:
                raise StoreError(f"{path}: dim {dim!r} is not a number of values")
            index = cls(
                dim=dim,
                dtype=content["dtype"],
                fingerprint=dict(content["fingerprint"]),
                complete=bool(content["complete"]),
                shards=[ShardEntry(**entry) for entry in content["shards"]],
                generation=int(content.get("generation", 0)),
                serial=int(content.get("serial", 0)),
                lookup=LookupEntry(**lookup) if lookup else None,
            )
            for entry in (*index.shards, *([index.lookup] if index.lookup else [])):
                entry.require_valid()
            return index
        except (KeyError, TypeError, ValueError, OverflowError) as problem:
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


def check_fingerprint(root: Path, stored: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Make sure that the encoder behind the store `root` is the expected one.

    Raises:
        StoreError: says which entries differ.
    """
    if difference := fingerprint_difference(stored, expected):
        raise StoreError(
            f"the embedding store {root} was made by another encoder than expected:\n  "
            + "\n  ".join(difference)
            + "\nUse the store made with that LLM, or embed the captions again into a new directory."
        )


def prefix_fingerprint(fingerprint: Mapping[str, Any], dim: int) -> dict[str, Any]:
    """The fingerprint of the encoder whose embeddings are the first `dim` values of another one's."""
    return {**fingerprint, "dim": dim} if "dim" in fingerprint else dict(fingerprint)


def preview(texts: Sequence[str], count: int = 10, width: int = 80) -> str:
    """The first `count` texts, quoted and shortened, one a line."""
    lines = [repr(text if len(text) <= width else text[: width - 1] + "…") for text in texts[:count]]
    return "\n  ".join(["", *lines])
