"""Makers of hostile files: tar headers, images, GGUF and safetensors headers that lie, pickles that run code."""

from __future__ import annotations

import io
import json
import pickle
import struct
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from tests.data_files import image_bytes, members_of


class Harm:
    """Makes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


def write_pickle(file: Path) -> None:
    """A pickle that makes `harmed` beside it."""
    file.write_bytes(pickle.dumps({"state": Harm(file.parent / "harmed")}))


def tar_header(name: str, size: int, kind: bytes = b"0", link: str = "") -> bytes:
    """One header block with a right checksum; sizes from 8 GiB in base 256."""
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = size, kind, link
    return info.tobuf(tarfile.GNU_FORMAT)[-512:]


def with_good_sample(*blocks: bytes) -> bytes:
    """A tar file of one good sample and then `blocks`."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members_of(["good"]):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    content = sum((len(data) + 511) // 512 * 512 + 512 for _, data in members_of(["good"]))
    return buffer.getvalue()[:content] + b"".join(blocks) + bytes(1024)


def member(name: str, data: bytes) -> bytes:
    """Header and content."""
    return tar_header(name, len(data)) + data + bytes(-len(data) % 512)


def many_members(count: int) -> Iterator[bytes]:
    """Empty members, each another sample."""
    for number in range(count):
        yield tar_header(f"{number:09d}.cls", 0)


def pax(records: bytes) -> bytes:
    """A pax header for the next member."""
    body = b"%d %s\n" % (len(records) + 1 + len(str(len(records) + 4)) + 1, records)
    return tar_header("pax", len(body), b"x") + body + bytes(-len(body) % 512)


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG that says it has so many pixels and has none, with further chunks."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in parts
    )


def text_bomb(mib: int) -> bytes:
    """A PNG with a compressed comment that takes `mib` MiB."""
    packer = zlib.compressobj(9)
    packed = b"".join(packer.compress(bytes(1 << 20)) for _ in range(mib)) + packer.flush()
    return png(8, 8, (b"zTXt", b"Comment\0\0" + packed))


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    """An image as a file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def polyglot() -> bytes:
    """A GIF that is a zip archive and a web page, too."""
    return image_bytes(kind="GIF") + b"<script>alert(1)</script>" + b"PK\x05\x06" + bytes(18)


def animation(kind: str) -> bytes:
    """A red and a green frame."""
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((250, 0, 0), (0, 250, 0))]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=10)


def gguf(tensors: int, pairs: int, body: bytes = b"") -> bytes:
    """A GGUF header that promises so many tensors and key-value pairs."""
    return struct.pack("<4sIQQ", b"GGUF", 3, tensors, pairs) + body


def gguf_text(key: str, length: int) -> bytes:
    """A pair whose value is a string that says it is `length` long."""
    return struct.pack("<Q", len(key)) + key.encode() + struct.pack("<IQ", 8, length)


def gguf_array(key: str, length: int) -> bytes:
    """A pair whose value is an array of strings that says it has `length` elements."""
    return struct.pack("<Q", len(key)) + key.encode() + struct.pack("<IIQ", 9, 8, length)


def safetensors(shape: list[int], offsets: list[int], *, length: int | None = None, data: int = 16) -> bytes:
    """A file with one fp32 tensor of that shape and place."""
    header = json.dumps({"weight": {"dtype": "F32", "shape": shape, "data_offsets": offsets}}).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + bytes(data)
