"""The embedding store: build, verify, open, and random reads against raw memory-mapped reads.

python -m benchmarks.bench_store --rows 1000000 --dim 1024 --dtype fp16 int8

Embeddings are random, captions are sentences with a number. Reads take --batch random rows:

    raw           np.take of the stored bytes from one memory-mapped file into given memory: no decoding, no shards,
                  no captions. What the disk format costs at least.
    raw_fp32      the same rows as a new fp32 tensor, in NumPy and torch: what `read` replaces
    read_into     EmbeddingStore.read(rows, out=...), decoded to fp32
    get_into      EmbeddingStore.get(captions, out=...): hashing and lookup included
    read          EmbeddingStore.read(rows) into new memory

"of_raw" is their throughput over that of `raw`, in rows, in the same rounds; the target is 0.9. With --cold the files
are dropped from the page cache before every read: then the disk is what is measured.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import torch

from benchmarks import harness
from llm2clip.data.store import EmbeddingStore, StoreWriter, verify_store
from llm2clip.data.store_format import StoreIndex, decode_rows
from llm2clip.data.tensorfile import map_tensors
from llm2clip.settings import StoreDtype

FINGERPRINT = {"encoder": "synthetic"}
TARGET = 0.9
_CHUNK = 16384


def caption(number: int) -> str:
    """A caption of usual length (110 characters)."""
    return f"a photograph of number {number} on a wooden table in a room with two windows, seen from a little above"


def build(path: Path, rows: int, dim: int, dtype: StoreDtype) -> float:
    """Write the store; seconds spent in the writer."""
    generator = torch.Generator().manual_seed(0)
    spent = 0.0
    with StoreWriter(path, dim=dim, dtype=dtype, fingerprint=FINGERPRINT) as writer:
        for start in range(0, rows, _CHUNK):
            count = min(_CHUNK, rows - start)
            values = torch.randn(count, dim, generator=generator)
            captions = [caption(number) for number in range(start, start + count)]
            begin = time.perf_counter()
            writer.add(captions, values)
            spent += time.perf_counter() - begin
        begin = time.perf_counter()
        writer.finish()
        return spent + time.perf_counter() - begin


class Raw:
    """The stored bytes of all shards in one file, mapped: rows (n, bytes), and their scales."""

    def __init__(self, store: Path, path: Path) -> None:
        index = StoreIndex.load(store)
        self.dtype: StoreDtype = index.dtype
        shards = [map_tensors(store / entry.file) for entry in index.shards]
        if not path.exists():
            with open(path, "wb") as file:
                for tensors in shards:
                    file.write(tensors["embeddings"].data)
        kind = shards[0]["embeddings"].dtype
        self.path, self.map = path, np.memmap(path, kind, "r", shape=(index.rows, index.dim))
        self.scales = np.concatenate([t["scales"] for t in shards]) if "scales" in shards[0] else None

    def take(self, rows: npt.NDArray[np.int64], out: npt.NDArray[Any]) -> None:
        np.take(self.map, rows, axis=0, out=out, mode="clip")

    def fp32(self, rows: npt.NDArray[np.int64]) -> torch.Tensor:
        scales = None if self.scales is None else self.scales[rows]
        return decode_rows(self.map[rows], scales, self.dtype)


def drop_from_cache(paths: list[Path]) -> None:
    """Let the system forget the content of files: the next read comes from the disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


class Reads:
    """The providers over one opened store and one raw file; each reads other rows every time, the same for all."""

    def __init__(self, folder: Path, raw: Raw, batch: int) -> None:
        self._store, self._raw = EmbeddingStore.open(folder / "store"), raw
        rng = np.random.default_rng(0)
        self._batches = [rng.integers(0, len(self._store), batch) for _ in range(16)]
        self._named = [[caption(number) for number in rows.tolist()] for rows in self._batches]
        self._out = torch.empty(batch, self._store.dim)
        self._stored = np.empty((batch, self._store.dim), raw.map.dtype)
        self._turn = dict.fromkeys(self.providers(), 0)

    def providers(self) -> dict[str, Callable[[], Any]]:
        store, raw = self._store, self._raw
        return {
            "raw": lambda: raw.take(self._rows("raw"), self._stored),
            "raw_fp32": lambda: raw.fp32(self._rows("raw_fp32")),
            "read_into": lambda: store.read(self._rows("read_into"), out=self._out),
            "get_into": lambda: store.get(self._named[self._next("get_into")], out=self._out),
            "read": lambda: store.read(self._rows("read")),
        }

    def _next(self, name: str) -> int:
        self._turn[name] = (self._turn[name] + 1) % len(self._batches)
        return self._turn[name]

    def _rows(self, name: str) -> npt.NDArray[np.int64]:
        return self._batches[self._next(name)]

    def check(self) -> None:
        """Compare every one of ours with the definition."""
        for name in ("read_into", "get_into", "read"):
            got = self.providers()[name]()
            if not torch.equal(got, self._raw.fp32(self._batches[self._turn[name]])):
                raise SystemExit(f"{name}: our own result is wrong")

    def touch(self) -> None:
        """Map every page, so that page faults are not what is measured."""
        for rows in np.array_split(np.arange(len(self._store)), max(1, len(self._store) // _CHUNK)):
            self._raw.map[rows].sum()
            self._store.read(rows)


def measure_reads(folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of the table of reads."""
    raw = Raw(folder / "store", folder / "raw.bin")
    reads = Reads(folder, raw, options.batch)
    reads.check()
    if options.cold:
        del reads, raw  # the system keeps what is mapped
        times = _interleave_cold(folder, options)
    else:
        reads.touch()
        times = harness.interleave(
            reads.providers(), rounds=options.rounds, min_seconds=options.min_seconds, device="cpu"
        )
    result = []
    for name, seconds in times.items():
        median = harness.summarize(seconds)["median_ms"]
        result.append(
            {
                "provider": name + (", cold" if options.cold else ""),
                "median_ms": round(median, 3),
                "rows_per_second": round(1e3 * options.batch / median),
                "of_raw": round(1 / harness.ratio_to(seconds, times["raw"]), 3),
            }
        )
    return result


def _interleave_cold(folder: Path, options: argparse.Namespace) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {}
    files = [folder / "raw.bin", *sorted((folder / "store").glob("*.safetensors"))]
    for _ in range(options.rounds):
        for name in ("raw", "raw_fp32", "read_into", "get_into", "read"):
            drop_from_cache(files)
            reads = Reads(folder, Raw(folder / "store", folder / "raw.bin"), options.batch)
            function = reads.providers()[name]
            begin = time.perf_counter()
            function()
            times.setdefault(name, []).append(time.perf_counter() - begin)
            del reads, function
    return times


def _open(path: str) -> Callable[[], Any]:
    return lambda: EmbeddingStore.open(path)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--dtype", nargs="+", default=["fp16"], choices=get_args(StoreDtype))
    parser.add_argument("--batch", type=int, default=8192, help="rows of one read")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--min-seconds", type=float, default=0.0, help="of reads, at least")
    parser.add_argument("--cold", action="store_true", help="read from the disk, not from memory")
    parser.add_argument("--folder", help="where the files go for a while; twice the size of the store")
    parser.add_argument("--no-save", action="store_true", help="print only")
    options = parser.parse_args(arguments)
    table: list[dict[str, Any]] = []
    for dtype in options.dtype:
        folder = Path(tempfile.mkdtemp(prefix="store-", dir=options.folder))
        try:
            shape = {"rows": options.rows, "dim": options.dim, "dtype": dtype}
            seconds = build(folder / "store", options.rows, options.dim, dtype)
            size = sum(file.stat().st_size for file in (folder / "store").glob("*.safetensors"))
            figures: dict[str, Any] = {
                "provider": "build",
                "rows_per_second": round(options.rows / seconds),
                "mib_per_second": round(size / 2**20 / seconds),
                "bytes_per_row": round(size / options.rows, 1),
            }
            table.append(shape | figures)
            print(table[-1], flush=True)
            begin = time.perf_counter()
            report = verify_store(folder / "store")
            seconds = time.perf_counter() - begin
            if not report.ok:
                raise SystemExit(f"verify: the store that was just built is damaged\n{report}")
            table.append(shape | {"provider": "verify", "mib_per_second": round(size / 2**20 / seconds)})
            print(table[-1], flush=True)
            memory, seconds = harness.peak_and_seconds(_open, str(folder / "store"), device="cpu")
            table.append(
                shape
                | {"provider": "open", "median_ms": round(1e3 * seconds, 1), "memory_mib": round(memory, 1)}
            )
            print(table[-1], flush=True)
            for row in measure_reads(folder, options):
                table.append(shape | {"batch": options.batch} | row)
                print(table[-1], flush=True)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    if not options.no_save:
        print(harness.save("store_cold" if options.cold else "store", table, target_of_raw=TARGET))


if __name__ == "__main__":
    main()
