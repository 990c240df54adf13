"""Tar shards: the index of their members, and a writer with reproducible bytes.

The index is a scan of the 512-byte headers: members are addressed by offset and read with `os.pread`,
so nothing is ever extracted or unpickled, and links, devices and directories are left out by type.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llm2clip.errors import DataError
from llm2clip.files import atomic_path, disk_errors

_host: Any
try:
    _host = importlib.import_module("llm2clip._host")
except ImportError:  # built without a C++ compiler
    _host = None

BLOCK = 512
# path records are short; a larger header body is damage, not a name
MAX_HEADER_BODY = 1 << 20


@dataclass(slots=True)
class TarIndex:
    """Members of one tar file.

    Attributes:
        names: member names as stored.
        offsets: first byte of each member's content.
        sizes: length of each member's content in bytes.
        refused: (name, reason) of members that are not regular files.
        damage: what is wrong with the file from some point on, or "" when it is complete.
    """

    names: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)
    damage: str = ""


def index_tar(path: str | os.PathLike[str]) -> TarIndex:
    """Index a tar file (ustar, GNU long names, pax) with the native scanner where it is built.

    A file that ends or is damaged in the middle gives the members before that point and `damage`.

    Raises:
        OSError: the file cannot be opened or read.
    """
    if _host is None:
        return index_tar_python(path)
    names, offsets, sizes, refused, damage = _host.index_tar(os.fsencode(path))
    return TarIndex(
        [_text(name) for name in names], offsets, sizes, [(_text(name), why) for name, why in refused], damage
    )


def index_tar_python(path: str | os.PathLike[str]) -> TarIndex:
    """The same scan in Python; the definition the native scanner is tested against."""
    index = TarIndex()
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    try:
        _scan(descriptor, os.fstat(descriptor).st_size, index)
    finally:
        os.close(descriptor)
    return index


def _scan(descriptor: int, end: int, index: TarIndex) -> None:
    position = 0
    long_name: bytes | None = None
    pax: dict[bytes, bytes] = {}
    while True:
        header = os.pread(descriptor, BLOCK, position)
        if len(header) < BLOCK:
            # some writers leave out the two empty blocks at the end; that loses nothing
            if header or position > end or long_name is not None or pax:
                index.damage = f"cut inside a header at byte {position}"
            return
        if not any(header):
            return
        if not _checksum_ok(header):
            index.damage = f"damaged header at byte {position}"
            return
        size = _number(header[124:136])
        kind = header[156:157]
        if kind in b"LKxg" and kind != b"\0":
            body = position + BLOCK
            if size < 0 or size > MAX_HEADER_BODY:
                index.damage = f"damaged header at byte {position}"
                return
            data = os.pread(descriptor, size, body)
            if len(data) < size:
                index.damage = f"cut inside a header at byte {position}"
                return
            if kind == b"L":
                long_name = data.split(b"\0", 1)[0]
            elif kind == b"x":
                pax = _pax_records(data)
            position = body + _padded(size)
            continue
        if b"size" in pax:
            size = _decimal(pax[b"size"])
        name = pax.get(b"path") or long_name or _short_name(header)
        long_name, pax = None, {}
        if size < 0:
            index.damage = f"damaged header at byte {position}"
            return
        content = position + BLOCK
        has_content = kind not in b"123456" or kind == b"\0"
        if kind in b"0\x007":
            if name.endswith(b"/") and kind == b"\0":
                pass  # how tar files before POSIX mark a directory
            elif content + size > end:
                index.damage = f"cut inside member {_text(name)!r} at byte {end}"
                return
            else:
                index.names.append(_text(name))
                index.offsets.append(content)
                index.sizes.append(size)
        elif kind != b"5":
            index.refused.append((_text(name), _KINDS.get(kind, "not a regular file")))
        position = content + (_padded(size) if has_content else 0)


_KINDS = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a device",
    b"4": "a device",
    b"6": "a pipe",
}


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _padded(size: int) -> int:
    return (size + BLOCK - 1) // BLOCK * BLOCK


def _checksum_ok(header: bytes) -> bool:
    # the checksum field itself counts as eight spaces
    total = sum(header) - sum(header[148:156]) + 8 * 32
    return total == _number(header[148:156])


def _number(data: bytes) -> int:
    """Octal text, or base 256 when the first bit is set (members of 8 GiB and more); -1 when neither."""
    if data[0] & 0x80:
        value = int.from_bytes(bytes([data[0] & 0x7F]) + data[1:], "big")
        return value if value < 1 << 62 else -1
    digits = data.split(b"\0", 1)[0].strip(b" ")
    if not digits:
        return 0
    return int(digits, 8) if all(48 <= digit < 56 for digit in digits) else -1


def _decimal(digits: bytes) -> int:
    # longer than any file: damage, and int() refuses thousands of digits
    value = int(digits) if digits.isdigit() and len(digits) < 20 else -1
    return value if value < 1 << 58 else -1


def _short_name(header: bytes) -> bytes:
    name = header[:100].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0":
        prefix = header[345:500].split(b"\0", 1)[0]
        if prefix:
            return prefix + b"/" + name
    return name


def _pax_records(data: bytes) -> dict[bytes, bytes]:
    records: dict[bytes, bytes] = {}
    position = 0
    while position < len(data):
        space = data.find(b" ", position, position + 12)
        length = data[position:space] if space > position else b""
        if not length.isdigit() or int(length) <= space - position + 1 or position + int(length) > len(data):
            break
        key, separator, value = data[space + 1 : position + int(length) - 1].partition(b"=")
        if separator:
            records[key] = value
        position += int(length)
    return records


class ShardWriter:
    """Writes samples into numbered tar shards: same samples, same bytes.

    Each shard appears under its name only when it is complete.

    Args:
        directory: where the shards go; made when missing.
        prefix: `train` gives `train-000000.tar`, `train-000001.tar`, ...
        shard_samples: samples per shard.
    """

    def __init__(self, directory: str | os.PathLike[str], prefix: str, shard_samples: int = 1000) -> None:
        if shard_samples < 1:
            raise DataError(f"a shard must hold at least one sample, got {shard_samples}")
        self._directory, self._prefix, self._shard_samples = Path(directory), prefix, shard_samples
        self._pending: list[tuple[str, bytes]] = []
        self._count = 0
        self.paths: list[Path] = []

    def add(self, key: str, image: bytes, extension: str, record: Mapping[str, Any]) -> None:
        """Append one sample; `extension` names the image format (`png`)."""
        data = json.dumps(record, ensure_ascii=False).encode()
        self._pending += [(f"{key}.{extension}", image), (f"{key}.json", data)]
        self._count += 1
        if self._count % self._shard_samples == 0:
            self._flush()

    def close(self) -> list[Path]:
        """Write what is left and return the paths of all shards."""
        self._flush()
        return self.paths

    def _flush(self) -> None:
        if not self._pending:
            return
        path = self._directory / f"{self._prefix}-{len(self.paths):06d}.tar"
        with (
            atomic_path(path) as tmp,
            disk_errors(path),
            tarfile.open(tmp, "w", format=tarfile.GNU_FORMAT) as tar,
        ):
            for name, data in self._pending:
                # fixed owner, mode and time: the bytes depend on the samples alone
                member = tarfile.TarInfo(name)
                member.size, member.mode = len(data), 0o644
                tar.addfile(member, io.BytesIO(data))
        self.paths.append(path)
        self._pending = []
