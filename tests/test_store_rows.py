"""Reading rows at random: the native reader against its twin, every bit pattern of every format, and the disk."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from llm2clip.data import store_rows
from llm2clip.data.store import EmbeddingStore, StoreWriter
from llm2clip.data.store_format import SCALED, ShardEntry, decode_rows, encode_rows, shard_specs
from llm2clip.data.store_rows import NativeRows, PythonRows
from llm2clip.data.tensorfile import NUMPY_DTYPES, write_tensors
from llm2clip.errors import StoreError
from llm2clip.settings import StoreDtype

needs_native = pytest.mark.skipif(store_rows._host is None, reason="llm2clip._host is not built")
DTYPES = get_args(StoreDtype)


def write(path: Path, arrays: dict[str, np.ndarray], dtype: StoreDtype) -> ShardEntry:
    """A shard with given stored values, whatever they mean."""
    rows, dim = arrays["embeddings"].shape
    specs = shard_specs(rows, dim, dtype)
    full = {name: np.zeros(spec.shape, NUMPY_DTYPES[spec.dtype]) for name, spec in specs.items()} | arrays
    digest, size = write_tensors(path, specs, {name: [full[name]] for name in specs})
    return ShardEntry(path.name, rows, size, digest)


def sources(tmp_path: Path, dtype: StoreDtype, shards: list[dict[str, np.ndarray]]) -> list[Any]:
    dim = shards[0]["embeddings"].shape[1]
    made = [NativeRows(dim, dtype), PythonRows(dim, dtype)]
    for number, arrays in enumerate(shards):
        path = tmp_path / f"shard-{number}.safetensors"
        entry = write(path, arrays, dtype)
        for source in made:
            source.add(path, entry)
    return made


@pytest.fixture(params=["portable", "avx2", "avx512"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    try:
        store_rows._host.use_instruction_set(request.param)
    except RuntimeError as error:
        pytest.skip(str(error))
    yield request.param
    store_rows._host.use_instruction_set("auto")


def read(source: Any, rows: np.ndarray, dim: int) -> np.ndarray:
    out = np.full((len(rows), dim), np.nan, np.float32)
    source.read(rows, out)
    return out


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 7, 24, 64, 101])
def test_the_native_reader_equals_its_twin(tmp_path: Path, dtype: StoreDtype, dim: int, isa: str) -> None:
    generator = torch.Generator().manual_seed(dim)
    shards = [encode_rows(torch.randn(n, dim, generator=generator), dtype) for n in (5, 1, 40)]
    native, python = sources(tmp_path, dtype, shards)
    values = torch.cat([decode_rows(s["embeddings"].copy(), s.get("scales"), dtype) for s in shards]).numpy()
    rows = np.random.default_rng(0).integers(0, 46, 3000)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            for width in {1, dim // 2 + 1, dim}:
                for source in (native, python):
                    assert np.array_equal(read(source, rows, width), values[rows, :width])
        finally:
            torch.set_num_threads(1)
    assert read(native, rows[:0], dim).shape == (0, dim)
    for bad in (-1, 46):
        with pytest.raises(IndexError):
            native.read(np.array([bad]), np.empty((1, dim), np.float32))


@needs_native
@pytest.mark.parametrize("dtype", ["fp16", "bf16", "int8", "fp8"])
def test_every_stored_pattern_is_decoded_as_torch_does(tmp_path: Path, dtype: StoreDtype, isa: str) -> None:
    if dtype in SCALED:
        patterns = np.arange(256, dtype=np.uint8).view("i1" if dtype == "int8" else "u1")
        arrays = {"embeddings": patterns[None].repeat(3, 0), "scales": np.array([1, 0.37, 1e-30], np.float32)}
    else:
        patterns = np.arange(65536, dtype=np.uint16).view("<f2" if dtype == "fp16" else "<u2")
        arrays = {"embeddings": patterns[None]}
    native, python = sources(tmp_path, dtype, [arrays])
    rows = np.arange(len(arrays["embeddings"]))
    got, expected = read(native, rows, len(patterns)), read(python, rows, len(patterns))
    finite = np.isfinite(expected)  # a store holds nothing else
    assert finite.mean() > 0.96
    assert np.array_equal(got[finite].view(np.uint32), expected[finite].view(np.uint32))


@needs_native
def test_rows_that_are_not_in_memory_are_read_from_the_disk(tmp_path: Path) -> None:
    values = torch.randn(4000, 300)
    native, _ = sources(tmp_path, "fp32", [encode_rows(values, "fp32")])
    descriptor = os.open(tmp_path / "shard-0.safetensors", os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)
    rows = np.random.default_rng(0).permutation(4000)
    assert np.array_equal(read(native, rows, 300), values.numpy()[rows])


@needs_native
def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    native, _ = sources(tmp_path, "fp32", [encode_rows(torch.randn(4, 3), "fp32")])
    for rows, out in (
        (np.zeros(2, np.int64), np.empty((2, 4), np.float32)),
        (np.zeros(2, np.int64), np.empty((3, 3), np.float32)),
    ):
        with pytest.raises(ValueError, match="expected rows"):
            native.read(rows, out)
    reader = store_rows._host.RowReader(3, "fp32")
    with pytest.raises(ValueError, match="shorter than its rows"):
        reader.add(str(tmp_path / "shard-0.safetensors"), 400, 8, 0)
    with pytest.raises(OSError, match="absent"):
        reader.add(str(tmp_path / "absent"), 1, 8, 0)


@pytest.mark.parametrize("kind", [pytest.param(NativeRows, marks=needs_native), PythonRows])
def test_a_shard_of_another_shape_is_refused(tmp_path: Path, kind: Any) -> None:
    entry = write(tmp_path / "a.safetensors", encode_rows(torch.randn(4, 3), "fp32"), "fp32")
    for source in (kind(2, "fp32"), kind(3, "fp16")):
        with pytest.raises(StoreError, match="index.json promises"):
            source.add(tmp_path / "a.safetensors", entry)


@pytest.mark.parametrize("native", [pytest.param(True, marks=needs_native), False])
def test_a_store_reads_prefixes_and_into_given_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, native: bool
) -> None:
    if not native:
        monkeypatch.setattr(store_rows, "_host", None)
    names = [f"caption {number}" for number in range(50)]
    values = torch.randn(50, 12)
    fingerprint = {"dim": 12, "weights": "w"}
    with StoreWriter(tmp_path, dim=12, dtype="fp32", fingerprint=fingerprint, shard_rows=16) as out:
        out.add(names, values)
        out.finish()
    store = EmbeddingStore.open(tmp_path)
    memory = torch.full((20, 12), torch.nan)
    assert store.get(names[:20], out=memory) is memory and torch.equal(memory, values[:20])
    prefix = EmbeddingStore.open(tmp_path, dim=5)
    assert (prefix.dim, prefix.stored_dim, prefix.fingerprint["dim"]) == (5, 12, 5)
    assert torch.equal(prefix.get(names[::-1]), values.flip(0)[:, :5])
    prefix.check_fingerprint(fingerprint | {"dim": 5})
    assert prefix.verify() == []
    for bad in (torch.empty(20, 11), torch.empty(20, 12).half(), torch.empty(12, 20).T):
        with pytest.raises(ValueError, match=r"expected contiguous float32 of shape \(20, 12\)"):
            store.read(range(20), out=bad)
    with pytest.raises(StoreError, match="the first 13 were asked for"):
        EmbeddingStore.open(tmp_path, dim=13)
