"""Small data sets written by the data tests."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def image_bytes(
    color: tuple[int, ...] = (200, 30, 30), size: tuple[int, int] = (8, 6), kind: str = "PNG"
) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB" if len(color) == 3 else "RGBA", size, color).save(buffer, kind)
    return buffer.getvalue()


def write_tar(
    path: Path, members: Sequence[tuple[str, bytes]], extra: Sequence[tarfile.TarInfo] = ()
) -> Path:
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for info in extra:
            tar.addfile(info)
    return path


def members_of(keys: Sequence[str], record: Mapping[str, Any] | None = None) -> list[tuple[str, bytes]]:
    members = []
    for number, key in enumerate(keys):
        fields = (
            {"caption": f"caption of {key}", "alt": f"a longer text about {key}"}
            if record is None
            else record
        )
        members += [
            (f"{key}.png", image_bytes((number % 256, 9, 9))),
            (f"{key}.json", json.dumps(fields).encode()),
        ]
    return members


def write_shards(directory: Path, shards: int, samples: int, prefix: str = "train") -> list[Path]:
    directory.mkdir(parents=True, exist_ok=True)
    return [
        write_tar(
            directory / f"{prefix}-{shard:06d}.tar",
            members_of([f"{shard}x{number:04d}" for number in range(samples)]),
        )
        for shard in range(shards)
    ]
