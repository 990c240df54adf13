"""Safetensors files written as a stream and read through memory maps.

The safetensors library writes tensors that are whole in memory; a shard is merged from parts that need
not fit. The layout is public: 8 bytes little-endian header length, a JSON header, then the data.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import mmap
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from llm2clip.errors import StoreError
from llm2clip.files import atomic_path

# numpy has neither bfloat16 nor fp8: their bits travel as unsigned integers
NUMPY_DTYPES: dict[str, np.dtype[Any]] = {
    "U64": np.dtype("<u8"),
    "F32": np.dtype("<f4"),
    "U32": np.dtype("<u4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "F8_E4M3": np.dtype("u1"),
}
_MAX_HEADER = 1 << 20


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Type (safetensors name) and shape of one tensor of a file."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of the tensor's data in bytes."""
        return math.prod(self.shape) * NUMPY_DTYPES[self.dtype].itemsize


def write_tensors(
    path: str | os.PathLike[str],
    specs: Mapping[str, TensorSpec],
    chunks: Mapping[str, Iterable[npt.NDArray[Any]]],
) -> tuple[str, int]:
    """Write one safetensors file atomically.

    Args:
        path: final name of the file.
        specs: tensors in file order; put wider element types first, so that all are aligned.
        chunks: for each tensor, arrays whose bytes follow each other to make the tensor.

    Returns:
        (hexadecimal SHA-256 of the file, its size in bytes), taken from what was meant to be written,
        so that a disk that stores something else is found out.
    """
    header: dict[str, Any] = {}
    end = 0
    for name, spec in specs.items():
        header[name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [end, end + spec.nbytes],
        }
        end += spec.nbytes
    text = json.dumps(header).encode("ascii")
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with atomic_path(path) as tmp, open(tmp, "wb") as handle:
        prefix = struct.pack("<Q", len(text)) + text
        digest.update(prefix)
        handle.write(prefix)
        for name, spec in specs.items():
            written = 0
            for chunk in chunks[name]:
                if chunk.dtype != NUMPY_DTYPES[spec.dtype]:
                    raise TypeError(f"{name}: expected {NUMPY_DTYPES[spec.dtype]}, got {chunk.dtype}")
                data = np.ascontiguousarray(chunk).reshape(-1).view(np.uint8).data
                digest.update(data)
                handle.write(data)
                written += len(data)
            if written != spec.nbytes:
                raise ValueError(
                    f"{name}: expected {spec.nbytes} bytes for shape {spec.shape}, got {written}"
                )
    return digest.hexdigest(), 8 + len(text) + end


def tensor_layout(
    path: str | os.PathLike[str], *, expected_bytes: int | None = None
) -> dict[str, tuple[TensorSpec, int]]:
    """Type, shape and first byte of every tensor of a safetensors file, from its header.

    Raises:
        StoreError: the file is missing, shorter or longer than it should be, or has no valid header.
    """
    file = Path(path)
    with _opened(file) as handle:
        size = os.fstat(handle.fileno()).st_size
        if expected_bytes is not None and size != expected_bytes:
            raise StoreError(f"{file} has {size} bytes, expected {expected_bytes}: it is cut or half-copied")
        if size < 8:
            raise StoreError(f"{file} is not a safetensors file: {size} bytes")
        (length,) = struct.unpack("<Q", handle.read(8))
        try:
            if length > min(_MAX_HEADER, size - 8):
                raise ValueError(f"header of {length} bytes")
            header: dict[str, Any] = json.loads(handle.read(length))
            header.pop("__metadata__", None)
            layout: dict[str, tuple[TensorSpec, int]] = {}
            for name, entry in header.items():
                spec = TensorSpec(entry["dtype"], tuple(entry["shape"]))
                start, stop = entry["data_offsets"]
                if not all(type(number) is int and number >= 0 for number in (*spec.shape, start, stop)):
                    raise ValueError(f"tensor {name!r} has an impossible shape or place")
                if stop - start != spec.nbytes or start < 0 or 8 + length + stop > size:
                    raise ValueError(f"tensor {name!r} lies outside the file")
                layout[name] = (spec, 8 + length + start)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as problem:
            raise StoreError(f"{file} is damaged: its header is not valid safetensors ({problem})") from None
    return layout


def map_tensors(
    path: str | os.PathLike[str], *, expected_bytes: int | None = None
) -> dict[str, npt.NDArray[Any]]:
    """Memory-map every tensor of a safetensors file (bfloat16 and fp8 as their bits).

    Raises:
        StoreError: as `tensor_layout`.
    """
    file = Path(path)
    layout = tensor_layout(file, expected_bytes=expected_bytes)
    with _opened(file) as handle:
        mapped = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
    return {
        name: np.frombuffer(
            mapped, dtype=NUMPY_DTYPES[spec.dtype], count=math.prod(spec.shape), offset=offset
        ).reshape(spec.shape)
        for name, (spec, offset) in layout.items()
    }


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[BinaryIO]:
    try:
        with open(file, "rb") as handle:
            yield handle
    except FileNotFoundError:
        raise StoreError(f"{file} is missing") from None
    except OSError as problem:
        raise StoreError(f"{file} cannot be read: {problem.strerror}") from None
