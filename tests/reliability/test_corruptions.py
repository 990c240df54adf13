"""Every named corruption is caught with file and place; what can be repaired is, and nothing else is lost."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llm2clip.data.store import EmbeddingStore, StoreWriter, repair_store, verify_store
from llm2clip.errors import StoreError
from tests.reliability import artefacts
from tests.reliability.corruption import Corruption, caught, is_named
from tests.reliability.corruptions import CORRUPTIONS
from tests.reliability.damage import cut, edit_json


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return artefacts.build_all(tmp_path_factory.mktemp("good"))


@pytest.mark.parametrize("corruption", CORRUPTIONS, ids=lambda corruption: corruption.name)
def test_is_caught(corruption: Corruption, good: Path, tmp_path: Path) -> None:
    message = caught(corruption, good, tmp_path)
    assert is_named(corruption, message), message or "nothing was raised"
    assert not list(tmp_path.rglob("harmed"))


def test_there_are_thirty_and_undamaged_files_are_read(good: Path, tmp_path: Path) -> None:
    assert len({corruption.name for corruption in CORRUPTIONS}) >= 30
    for artefact in {corruption.artefact for corruption in CORRUPTIONS}:
        copy = artefacts.copied(good, artefact, tmp_path)
        changed = ("another encoder", "another model", "another configuration")  # no file is damaged
        readers = [c.read for c in CORRUPTIONS if c.artefact == artefact and not c.name.endswith(changed)]
        for read in set(readers):
            read(copy)


REPAIRED = [c for c in CORRUPTIONS if c.artefact == "store" and "shard-" in c.file or "table of" in c.name]


@pytest.mark.parametrize("corruption", REPAIRED, ids=lambda corruption: corruption.name)
def test_a_repaired_store_is_whole_again(corruption: Corruption, good: Path, tmp_path: Path) -> None:
    store = artefacts.copied(good, "store", tmp_path)
    corruption.damage(store)
    repair_store(store)
    assert verify_store(store).ok
    expected = artefacts.embeddings(len(artefacts.CAPTIONS))
    left = EmbeddingStore.open(store)
    rows = torch.from_numpy(left.find(artefacts.CAPTIONS)) >= 0
    kept = [text for text, there in zip(artefacts.CAPTIONS, rows.tolist(), strict=True) if there]
    assert torch.equal(left.get(kept), expected[rows])
    with StoreWriter(store, dim=4, dtype="fp32", fingerprint=artefacts.FINGERPRINT, shard_rows=1250) as out:
        missing = out.missing(artefacts.CAPTIONS)
        assert len(missing) == len(artefacts.CAPTIONS) - len(kept)
        out.add(missing, expected[~rows])
        out.finish()
    assert torch.equal(EmbeddingStore.open(store).get(artefacts.CAPTIONS), expected)


def test_repair_removes_nothing_outside_the_store(good: Path, tmp_path: Path) -> None:
    store = artefacts.copied(good, "store", tmp_path)
    precious = tmp_path / "precious.safetensors"
    precious.write_text("not a shard")
    for name in ("../precious.safetensors", str(precious), "shard-1.safetensors/../../precious.safetensors"):
        edit_json(store / "index.json", lambda value, name=name: value["shards"][0].update(file=name))
        with pytest.raises(StoreError, match=r"index.json is damaged.*precious"):
            repair_store(store)
    assert precious.read_text() == "not a shard"


def test_a_damaged_search_index_is_built_again(good: Path, tmp_path: Path) -> None:
    place = artefacts.copied(good, "search", tmp_path)
    cut(place / "shard-000001.safetensors", -1)
    index = artefacts.search_index(place)
    assert len(index) == artefacts.ITEMS and verify_store(place).ok
    unit = torch.nn.functional.normalize(artefacts.embeddings(artefacts.ITEMS), dim=1)
    assert index.search(unit, 1).items[:, 0].tolist() == list(range(artefacts.ITEMS))
