"""Ways to damage a file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from llm2clip.data.tensorfile import tensor_layout
from llm2clip.files import sha256_file


def flip(file: Path, at: int) -> None:
    """Turn one bit of the byte at `at`, from the end where it is negative."""
    data = bytearray(file.read_bytes())
    data[at] ^= 16
    file.write_bytes(data)


def flip_row(file: Path, tensor: str, row: int) -> None:
    """Turn one bit in a row of a tensor of a safetensors file."""
    spec, offset = tensor_layout(file)[tensor]
    flip(file, offset + row * (spec.nbytes // spec.shape[0]))


def cut(file: Path, size: int) -> None:
    """Keep the first `size` bytes, or all but the last where it is negative."""
    file.write_bytes(file.read_bytes()[:size])


def swap(a: Path, b: Path) -> None:
    """Exchange two files."""
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)


def replace(file: Path, old: bytes, new: bytes) -> None:
    """Other bytes in the place of the first of some."""
    data = file.read_bytes()
    assert old in data, file
    file.write_bytes(data.replace(old, new, 1))


def edit_json(file: Path, change: Callable[[Any], Any]) -> None:
    """Apply a function that changes the value in place."""
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


def edit_tensors(file: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Apply a function that changes the tensors of a safetensors file in place."""
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def seal_store(root: Path) -> None:
    """Write the checksums that the shards have now into the index: damage from before they were written."""

    def change(index: dict[str, Any]) -> None:
        for entry in index["shards"]:
            entry |= {
                "sha256": sha256_file(root / entry["file"]),
                "bytes": (root / entry["file"]).stat().st_size,
            }

    edit_json(root / "index.json", change)


def seal_checkpoint(step: Path) -> None:
    """The same for a checkpoint's meta.json."""

    def change(meta: dict[str, Any]) -> None:
        meta["sha256"] = {name: sha256_file(step / name) for name in meta["sha256"]}

    edit_json(step / "meta.json", change)
