"""The embedding store: round trips, lookup, resuming after SIGKILL, damage, full disks."""

from __future__ import annotations

import errno
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from llm2clip.data.store import EmbeddingStore, StoreWriter, caption_digest, repair_store, verify_store
from llm2clip.errors import StoreError, UserError

FINGERPRINT = {"weights": "abc", "pooling": "mean", "max_length": 512}
DTYPES = ["fp32", "bf16", "fp16", "int8"]


def texts(count: int, start: int = 0) -> list[str]:
    return [f"caption {number} é <b>" for number in range(start, start + count)]


def vectors(names: list[str], dim: int = 24) -> torch.Tensor:
    """An embedding that only the text decides, so any run can check any store."""
    rows = [np.random.default_rng(list(caption_digest(name))).standard_normal(dim) for name in names]
    return torch.tensor(np.array(rows), dtype=torch.float32).reshape(len(names), dim)


def writer(path: Path, dtype: str = "fp32", dim: int = 24, **options: int) -> StoreWriter:
    defaults = {"shard_rows": 32, "commit_rows": 8} | options
    return StoreWriter(path, dim=dim, dtype=dtype, fingerprint=FINGERPRINT, **defaults)  # type: ignore[arg-type]


def build(path: Path, names: list[str], dtype: str = "fp32") -> EmbeddingStore:
    with writer(path, dtype) as out:
        out.add(names, vectors(names))
        out.finish()
    return EmbeddingStore.open(path)


@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip_error_is_bounded_by_the_format(tmp_path: Path, dtype: str) -> None:
    names = texts(101)
    expected = vectors(names)
    store = build(tmp_path / "store", names, dtype)
    assert store.complete and len(store) == 101 and store.dim == 24 and store.dtype == dtype
    got = store.get(names)
    assert got.dtype == torch.float32
    largest = expected.abs().amax(dim=1, keepdim=True)
    bound = {
        "fp32": torch.zeros_like(expected),
        "bf16": expected.abs() * 2.0**-8,
        "fp16": expected.abs() * 2.0**-11 + 2.0**-25,
        "int8": (largest / 254 * 1.001).expand_as(expected),
    }[dtype]
    assert ((got - expected).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_shards_are_ordinary_safetensors_of_the_promised_size(tmp_path: Path, dtype: str) -> None:
    names = texts(70)
    store = build(tmp_path, names, dtype)
    index = json.loads((tmp_path / "index.json").read_text())
    assert [entry["rows"] for entry in index["shards"]] == [32, 32, 6]
    assert sorted(p.name for p in tmp_path.glob("*.safetensors")) == sorted(
        e["file"] for e in index["shards"]
    )
    row = 0
    for entry in index["shards"]:
        with safe_open(tmp_path / entry["file"], "pt") as file:
            stored = file.get_tensor("embeddings").float()
            if dtype == "int8":
                stored = stored * file.get_tensor("scales")[:, None]
            assert torch.equal(stored, store.read(np.arange(row, row + entry["rows"])))
            raw = file.get_tensor("digests").numpy()
        assert raw.tobytes() == b"".join(caption_digest(name) for name in names[row : row + entry["rows"]])
        row += entry["rows"]


def test_zero_rows_survive_int8(tmp_path: Path) -> None:
    with writer(tmp_path, "int8") as out:
        out.add(["nothing"], torch.zeros(1, 24))
        out.finish()
    assert torch.equal(EmbeddingStore.open(tmp_path).get(["nothing"]), torch.zeros(1, 24))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.text(max_size=6), max_size=40), st.lists(st.integers(0, 39), max_size=60), st.integers(1, 9)
)
def test_lookup_is_a_dictionary(
    tmp_path_factory: pytest.TempPathFactory, names: list[str], order: list[int], size: int
) -> None:
    path = tmp_path_factory.mktemp("store")
    with writer(path, shard_rows=size, commit_rows=size) as out:
        for start in range(0, len(names), 7):
            out.add(names[start : start + 7], vectors(names[start : start + 7]))
        assert out.missing(names) == [] and len(out) == len(set(names))
        out.finish()
    store = EmbeddingStore.open(path)
    asked = [names[i] for i in order if i < len(names)]
    assert torch.equal(store.get(asked), vectors(asked))
    assert len(store) == len(set(names))


def test_missing_captions_are_counted_and_the_first_ten_named(tmp_path: Path) -> None:
    store = build(tmp_path, texts(5))
    asked = texts(5) + texts(12, start=100) + texts(1, start=100)
    with pytest.raises(StoreError) as caught:
        store.get(asked)
    message = str(caught.value)
    assert "lacks 12 " in message and "llm2clip embed" in message
    assert all(repr(name) in message for name in texts(10, start=100))
    assert "caption 110" not in message and "caption 4 " not in message


def test_rows_outside_the_store_are_refused(tmp_path: Path) -> None:
    store = build(tmp_path, texts(5))
    for bad in ([-1], [5]):
        with pytest.raises(IndexError, match="store has 5"):
            store.read(bad)


def test_another_fingerprint_is_named_entry_by_entry(tmp_path: Path) -> None:
    store = build(tmp_path, texts(5))
    store.check_fingerprint(FINGERPRINT)
    with pytest.raises(StoreError) as caught:
        store.check_fingerprint(FINGERPRINT | {"weights": "xyz", "prompt": "p"})
    assert "weights: stored 'abc', expected 'xyz'" in str(caught.value)
    assert "prompt: stored 'nothing', expected 'p'" in str(caught.value)
    assert "pooling" not in str(caught.value)
    for change in ({"fingerprint": {"weights": "xyz"}}, {"dim": 25}, {"dtype": "fp16"}):
        options = {"dim": 24, "dtype": "fp32", "fingerprint": FINGERPRINT} | change
        with pytest.raises(StoreError, match="begun with other settings"):
            StoreWriter(tmp_path, **options)  # type: ignore[arg-type]


def test_uncommitted_rows_are_dropped_and_committed_ones_stay(tmp_path: Path) -> None:
    names = texts(20)
    with writer(tmp_path) as out:
        out.add(names, vectors(names))
    store = EmbeddingStore.open(tmp_path)
    assert len(store) == 16 and not store.complete
    with pytest.raises(StoreError, match="unfinished"):
        store.get(names)
    with writer(tmp_path) as out:
        assert out.missing(names) == names[16:]
        out.add(names, vectors(names) + 1)  # what is stored stays as it was
        out.finish()
    store = EmbeddingStore.open(tmp_path)
    assert torch.equal(store.get(names), torch.cat([vectors(names[:16]), vectors(names[16:]) + 1]))


def test_a_complete_store_takes_more_captions(tmp_path: Path) -> None:
    build(tmp_path, texts(20))
    with writer(tmp_path) as out:
        more = texts(30, start=10)
        out.add(more, vectors(more))
    assert not EmbeddingStore.open(tmp_path).complete
    store = build(tmp_path, texts(40))
    assert store.complete and len(store) == 40
    assert torch.equal(store.get(texts(40)), vectors(texts(40)))


def test_two_writers_at_once_are_refused(tmp_path: Path) -> None:
    with writer(tmp_path), pytest.raises(StoreError, match="another process is writing"):
        writer(tmp_path)
    writer(tmp_path).close()


def test_absorbing_copies_what_is_missing_without_rounding_again(tmp_path: Path) -> None:
    names = texts(60)
    other = build(tmp_path / "other", names[20:], "int8")
    with writer(tmp_path / "main", "int8") as out:
        out.add(names[:30], vectors(names[:30]))
        assert out.absorb(tmp_path / "other") == 30
        assert out.absorb(tmp_path / "other") == 0
        out.finish()
    store = EmbeddingStore.open(tmp_path / "main")
    assert len(store) == 60
    assert torch.equal(store.get(names[30:]), other.get(names[30:]))


KILLED = """
    import sys, time
    sys.path[:0] = [{root!r}, {tests!r}]
    from pathlib import Path
    from test_store import texts, vectors, writer
    print("ready", flush=True)
    with writer(Path({path!r}), "fp16", shard_rows=40, commit_rows=7) as out:
        for name in out.missing(texts(400)):
            out.add([name], vectors([name]))
        out.finish()
"""


def test_sigkill_at_random_instants_loses_and_doubles_nothing(tmp_path: Path) -> None:
    tests = Path(__file__).resolve().parent
    path = tmp_path / "store"
    code = textwrap.dedent(KILLED.format(root=str(tests.parent), tests=str(tests), path=str(path)))
    chance = random.Random(0)
    kills, committed = 0, 0
    for _ in range(6):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        assert process.stdout is not None and process.stdout.readline()  # imports are over, writing begins
        try:
            process.wait(chance.uniform(0.02, 0.15))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
        process.stdout.close()
        if (path / "index.json").exists():
            report = verify_store(path)
            assert report.ok, report
            assert report.rows >= committed  # nothing committed is ever lost
            committed = report.rows
    assert kills >= 3
    with writer(path, "fp16", shard_rows=40, commit_rows=7) as out:
        missing = out.missing(texts(400))
        out.add(missing, vectors(missing))
        out.finish()
    store = EmbeddingStore.open(path)
    report = verify_store(path)
    assert report.ok and report.complete and not report.stray and len(store) == 400
    assert torch.equal(store.get(texts(400)), vectors(texts(400)).half().float())
    assert not list(path.glob("part-*"))


@pytest.mark.parametrize("step", range(1, 13))
def test_a_failure_at_every_write_leaves_a_store_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """The disk is full at the n-th sync; after each, the store is whole and can be finished."""
    real, calls = os.fsync, 0

    def fsync(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == step:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    names = texts(40)
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(UserError, match="no space left on disk"), writer(tmp_path, shard_rows=16) as out:
        out.add(names, vectors(names))
        out.finish()
    monkeypatch.undo()
    if (tmp_path / "index.json").exists():
        report = verify_store(tmp_path)
        assert report.ok and not report.complete
        assert EmbeddingStore.open(tmp_path).rows(names[: report.rows]).tolist() == list(range(report.rows))
    assert torch.equal(build(tmp_path, names).get(names), vectors(names))
    assert not verify_store(tmp_path).stray


def test_files_of_an_interrupted_write_are_reported_and_removed(tmp_path: Path) -> None:
    names = texts(40)
    build(tmp_path, names)
    (tmp_path / "part-000099.safetensors").write_bytes(b"half")
    (tmp_path / "shard-000050.safetensors.partial.77").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("mine")
    report = verify_store(tmp_path)
    assert report.ok and report.stray == ["part-000099.safetensors", "shard-000050.safetensors.partial.77"]
    build(tmp_path, names)
    assert verify_store(tmp_path).stray == [] and (tmp_path / "notes.txt").exists()


def test_one_flipped_bit_is_found_and_only_its_shard_rebuilt(tmp_path: Path) -> None:
    names = texts(96)
    store = build(tmp_path, names)
    shards = sorted(tmp_path.glob("shard-*"))
    data = bytearray(shards[1].read_bytes())
    data[-100] ^= 1
    shards[1].write_bytes(data)
    assert store.verify() == [shards[1].name]
    report = repair_store(tmp_path)
    assert list(report.damaged) == [shards[1].name] and "checksum" in str(report)
    before = shards[0].stat().st_mtime_ns
    with writer(tmp_path) as out:
        assert out.missing(names) == names[32:64]
        out.add(names[32:64], vectors(names[32:64]))
        out.finish()
    assert shards[0].stat().st_mtime_ns == before
    assert verify_store(tmp_path).ok
    assert torch.equal(EmbeddingStore.open(tmp_path).get(names), vectors(names))


@pytest.mark.parametrize("damage", ["cut", "gone", "header"])
def test_a_damaged_shard_is_named_when_opening(tmp_path: Path, damage: str) -> None:
    build(tmp_path, texts(40))
    shard = sorted(tmp_path.glob("shard-*"))[1]
    data = shard.read_bytes()
    if damage == "gone":
        shard.unlink()
    else:
        shard.write_bytes(data[:-5] if damage == "cut" else b"\xff" * 40 + data[40:])
    with pytest.raises(StoreError, match=shard.name) as caught:
        EmbeddingStore.open(tmp_path)
    assert "llm2clip embed" in str(caught.value)
    assert list(verify_store(tmp_path, checksums=False).damaged) == [shard.name]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("{}", "damaged"),
        ('{"format": "other"}', "expected 'llm2clip-embeddings'"),
        ('{"format": "llm2clip-embeddings", "version": 9}', "version 9"),
    ],
)
def test_a_bad_index_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "index.json").write_text(content)
    with pytest.raises(StoreError, match=message):
        EmbeddingStore.open(tmp_path)


def test_a_place_without_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="not an embedding store"):
        EmbeddingStore.open(tmp_path / "nowhere")
    (tmp_path / "shard-000000.safetensors").write_bytes(b"")
    with pytest.raises(StoreError, match="no index.json"):
        writer(tmp_path)
    assert (tmp_path / "shard-000000.safetensors").exists()


def test_values_that_cannot_be_stored_are_refused(tmp_path: Path) -> None:
    with writer(tmp_path / "a", "fp16") as out, pytest.raises(StoreError, match="bf16 or fp32"):
        out.add(["x"], torch.full((1, 24), 1e5))
        out.flush()
    with writer(tmp_path / "b") as out, pytest.raises(StoreError, match="NaN"):
        out.add(["x"], torch.full((1, 24), float("nan")))
        out.flush()
    assert len(EmbeddingStore.open(tmp_path / "b")) == 0


def test_a_store_travels_to_a_loader_process(tmp_path: Path) -> None:
    store = build(tmp_path, texts(40))
    again = pickle.loads(pickle.dumps(store))
    assert torch.equal(again.get(texts(40)), vectors(texts(40)))
