"""Addresses of captions and the tables that find their rows: native, NumPy and a dictionary agree."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm2clip.data import store_lookup
from llm2clip.data.store import EmbeddingStore, StoreWriter
from llm2clip.data.store_format import StoreIndex
from llm2clip.data.store_lookup import (
    MAX_ROWS,
    AddressTable,
    DigestIndex,
    as_digests,
    caption_digest,
    count_doubles,
    different,
    digest_array,
    digest_array_python,
    open_lookup,
)
from llm2clip.errors import StoreError

needs_native = pytest.mark.skipif(store_lookup._host is None, reason="llm2clip._host is not built")
finders = pytest.mark.parametrize(
    "find", [pytest.param(AddressTable.find, marks=needs_native), AddressTable.find_python]
)


def random_digests(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**64, (count, 2), dtype=np.uint64)


@needs_native
@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(max_size=300), max_size=20))
def test_the_native_hash_is_hashlibs(names: list[str]) -> None:
    assert np.array_equal(digest_array(names), digest_array_python(names))


@needs_native
def test_the_native_hash_at_every_block_border_and_of_any_text() -> None:
    # BLAKE2b works on 128 bytes; the last block is another case, full or not
    names = ["x" * length for length in range(400)] + [
        "é" * 64,
        "é" * 65,
        "\U0001f600" * 32,
        "\ud800 half",
        "\x00",
    ]
    digests = digest_array(names)
    assert [row.tobytes() for row in digests] == [caption_digest(name) for name in names]
    torch.set_num_threads(2)
    try:
        many = names * 20  # enough for two threads
        assert np.array_equal(digest_array(many), np.tile(digests, (20, 1)))
    finally:
        torch.set_num_threads(1)
    with pytest.raises(TypeError, match="caption 1 must be a string, got int"):
        digest_array(["a", 3])  # type: ignore[list-item]


@finders
@pytest.mark.parametrize("count", [0, 1, 7, 8, 1000, 40_000])
def test_a_table_finds_what_it_holds_and_nothing_else(find: object, count: int) -> None:
    assert callable(find)
    digests = random_digests(count)
    rows = np.random.default_rng(1).permutation(max(count, 1))[:count]
    table = AddressTable.build(digests, rows)
    assert np.array_equal(find(table, digests), rows)
    assert (find(table, random_digests(100, seed=5)) == -1).all()
    assert len(find(table, random_digests(0))) == 0
    # 16 bytes of address, 4 of row, and buckets of at most a byte more
    size = sum(a.nbytes for a in (table.high, table.low, table.rows, table.buckets))
    assert size <= 21 * count + 8


@finders
def test_addresses_with_an_equal_half_are_told_apart(find: object) -> None:
    assert callable(find)
    high, low = np.meshgrid(np.arange(50, dtype=np.uint64) << np.uint64(58), np.arange(40, dtype=np.uint64))
    digests = np.stack([high.ravel(), low.ravel()], axis=1)
    shuffled = np.random.default_rng(0).permutation(len(digests))
    table = AddressTable.build(digests[shuffled], np.arange(len(digests)))
    assert np.array_equal(find(table, digests[shuffled]), np.arange(len(digests)))
    absent = np.array([[0, 10**6], [int(49 << 58), 40], [2**64 - 1, 0]], np.uint64)
    assert (find(table, absent) == -1).all()


def test_a_growing_index_is_a_dictionary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_lookup, "_RECENT", 50)
    digests = random_digests(3000)
    base = AddressTable.build(digests[:500], np.arange(500))
    index = DigestIndex(base)
    start, sizes = 500, np.random.default_rng(2)
    while start < 3000:
        stop = min(3000, start + int(sizes.integers(1, 130)))  # below and above the limit
        index.extend(digests[start:stop], start)
        assert np.array_equal(index.find(digests[:stop]), np.arange(stop))
        assert (index.find(digests[stop:]) == -1).all()
        assert len(index) == stop and index.unsorted == stop - 500
        start = stop
    table = index.table()
    assert np.array_equal(table.find(digests), np.arange(3000))
    with pytest.raises(StoreError, match="at most"):
        index.extend(digests[:1], MAX_ROWS)


@needs_native
def test_tables_that_do_not_belong_together_are_refused() -> None:
    table = AddressTable.build(random_digests(100), np.arange(100))
    other = AddressTable.build(random_digests(64), np.arange(64))
    for broken in (
        AddressTable(table.high, table.low, table.rows, other.buckets),
        AddressTable(table.high, other.low, table.rows, table.buckets),
    ):
        with pytest.raises(ValueError, match="belong together"):
            broken.find(random_digests(3))


def fill(path: Path, first: int, count: int, **options: int) -> list[str]:
    names = [f"caption {number}" for number in range(first, first + count)]
    with StoreWriter(path, dim=2, dtype="fp32", fingerprint={}, **options) as out:
        out.add(names, torch.arange(first, first + count).float()[:, None].repeat(1, 2))
        out.finish()
    return names


def test_a_finished_store_has_its_table_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llm2clip.data import store_writer

    monkeypatch.setattr(store_writer, "_TABLE_ROWS", 100)
    names = fill(tmp_path, 0, 1000, shard_rows=300, commit_rows=64)
    (file,) = tmp_path.glob("lookup-*")
    index = StoreIndex.load(tmp_path)
    assert index.lookup is not None and index.lookup.file == file.name and index.lookup.rows == 1000
    assert open_lookup(tmp_path, index).unsorted == 0
    # few new captions stay outside of it, many give a new one
    names += fill(tmp_path, 1000, 90, shard_rows=300)
    assert list(tmp_path.glob("lookup-*")) == [file]
    assert open_lookup(tmp_path, StoreIndex.load(tmp_path)).unsorted == 90
    store = EmbeddingStore.open(tmp_path)
    assert np.array_equal(store.rows(names), np.arange(1090))
    names += fill(tmp_path, 1090, 300, shard_rows=300)
    (new,) = tmp_path.glob("lookup-*")
    assert new != file
    again = EmbeddingStore.open(tmp_path)
    assert np.array_equal(again.rows(names), np.arange(1390))
    assert torch.equal(again.get(names)[:, 0], torch.arange(1390).float())
    assert torch.equal(store.get(names[:1090])[:, 1], torch.arange(1090).float())  # opened before


def test_a_table_of_other_captions_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llm2clip.data import store_writer

    monkeypatch.setattr(store_writer, "_TABLE_ROWS", 10)
    fill(tmp_path, 0, 50)
    (file,) = tmp_path.glob("lookup-*")
    size = file.stat().st_size
    with pytest.raises(StoreError, match="addresses of 49 captions"):
        AddressTable.load(file, rows=49, expected_bytes=size)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(StoreError, match="llm2clip store repair"):
        EmbeddingStore.open(tmp_path)


def test_doubles_are_counted_and_dropped() -> None:
    digests = random_digests(500)
    assert count_doubles(digests) == 0 and len(different([digests])) == 500
    half = digests.copy()
    half[:, 1] += np.uint64(1)  # the same first halves, other addresses
    assert count_doubles(np.concatenate([digests, half])) == 0
    many = np.concatenate([digests, half, digests[:7], digests[:3]])
    assert count_doubles(many[np.random.default_rng(0).permutation(len(many))]) == 10
    assert len(different([digests, half, digests[:7]])) == 1000
    assert {row.tobytes() for row in different([many])} == {row.tobytes() for row in many}
    assert count_doubles(digests[:0]) == count_doubles(digests[:1]) == 0 and len(different([])) == 0


def test_bytes_become_addresses() -> None:
    raw = np.frombuffer(caption_digest("a") + caption_digest("b"), np.uint8)
    assert np.array_equal(as_digests(raw), digest_array_python(["a", "b"]))
