"""Every reader takes hundreds of damaged files with errors of ours alone; what fuzzing found stays found."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from llm2clip.data.store import EmbeddingStore, verify_store
from llm2clip.errors import CheckpointError, ConfigError, ModelError, StoreError, UserError
from llm2clip.training import checkpoint
from tests.reliability import artefacts
from tests.reliability.damage import edit_json
from tests.reliability.fuzz import Watch
from tests.reliability.mutate import mutants
from tests.reliability.readers import READERS, Reader

RUNS = {"gguf": 8, "weights": 120, "checkpoint": 120, "config": 150}


@pytest.mark.parametrize("name", READERS)
def test_damaged_files_end_in_our_errors(name: str, tmp_path: Path) -> None:
    reader = READERS[name]
    seeds, accepted = reader.seeds(), 0
    damaged = islice(mutants(seeds, random.Random(1)), RUNS.get(name, 250))
    for number, data in enumerate([*seeds, *damaged]):
        place = tmp_path / str(number)
        place.mkdir()
        with contextlib.suppress(UserError):
            reader.read(data, place)
            accepted += 1
    assert accepted > 0, "not even the good files are read"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return artefacts.build_all(tmp_path_factory.mktemp("good"))


@pytest.mark.parametrize(
    "pointer", [b"step_\xff\xfe", b"step_" + b"8" * 400, b"", b"..", b"step_00000004/../step_00000008"]
)
def test_pointers_of_a_run(pointer: bytes, good: Path, tmp_path: Path) -> None:
    run = artefacts.copied(good, "checkpoint", tmp_path)
    (run / "checkpoints" / "latest").write_bytes(pointer)
    with pytest.raises(CheckpointError, match="latest"):
        checkpoint.latest(run)


@pytest.mark.parametrize(
    "change",
    [
        lambda meta: meta["sha256"].update({"../../x": "0"}),
        lambda meta: meta.update(sha256=[1]),
        lambda meta: meta.update(scaler="ab"),
        lambda meta: meta["progress"].update(step=-1),
        lambda meta: meta["progress"].update(step=True),
        lambda meta: meta["progress"].update(seconds="long"),
    ],
)
def test_manifests_of_a_checkpoint(change: Callable[[Any], Any], good: Path, tmp_path: Path) -> None:
    step = artefacts.copied(good, "checkpoint", tmp_path) / "checkpoints" / "step_00000008"
    edit_json(step / "meta.json", change)
    with pytest.raises(CheckpointError, match=r"meta\.json"):
        checkpoint.load(step, *artefacts.training())


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index.update(dim="4"),
        lambda index: index.update(dim=0),
        lambda index: index["shards"][0].update(rows=-1),
        lambda index: index["shards"][0].update(rows=1e400),
        lambda index: index["shards"][0].update(bytes="many"),
        lambda index: index["shards"][0].update(sha256=None),
        lambda index: index["shards"][0].update(file="shard-1.safetensors\n"),
        lambda index: index["lookup"].update(file="/etc/passwd"),
        lambda index: index.update(generation=float("inf")),
    ],
)
def test_indexes_of_a_store(change: Callable[[Any], Any], good: Path, tmp_path: Path) -> None:
    store = artefacts.copied(good, "store", tmp_path)
    edit_json(store / "index.json", change)
    for read in (verify_store, EmbeddingStore.open):
        with pytest.raises(StoreError, match=r"index\.json"):
            read(store)


@pytest.mark.parametrize(
    "content", [[], {"weight_map": []}, {"weight_map": {"a": 1}}, {"weight_map": {"a": "../x"}}]
)
def test_indexes_of_sharded_weights(content: Any, tmp_path: Path) -> None:
    from llm2clip.models.weights import read_tensors

    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match=r"index\.json"):
        read_tensors(tmp_path)


def test_json_nested_too_deep(tmp_path: Path) -> None:
    from llm2clip.files import read_json

    (tmp_path / "a.json").write_text("[" * 100_000)
    with pytest.raises(ConfigError, match=r"a\.json is not valid JSON"):
        read_json(tmp_path / "a.json", ConfigError)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_json(tmp_path, ConfigError)


def test_the_fuzzer_keeps_each_kind_of_crash_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(data: bytes, place: Path) -> None:
        assert list(place.iterdir()) == []
        if data == b"ours":
            raise ConfigError("expected")
        if data.startswith(b"bad"):
            raise ZeroDivisionError(data)

    monkeypatch.setitem(READERS, "csv", Reader(read, lambda: [b"good"]))
    watch = Watch("csv", tmp_path, seconds=1e6)
    for data in (b"good", b"ours", b"bad 1", b"bad 2"):
        watch(data)
    watch.save()
    state = json.loads((tmp_path / "state.json").read_text())
    assert state["runs"] == 4 and len(state["crashes"]) == 1
    assert (tmp_path / "crash-1").read_bytes() == b"bad 1"
    assert "ZeroDivisionError" in (tmp_path / "crash-1.txt").read_text()
