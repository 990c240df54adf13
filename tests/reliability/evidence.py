"""What a command left on disk: facts to compare with those of an undisturbed run, and whether a killed one is whole."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from llm2clip.data.shards import index_tar
from llm2clip.data.store import EmbeddingStore, verify_store
from llm2clip.data.store_format import INDEX_NAME, StoreIndex
from llm2clip.data.tensorfile import map_tensors
from llm2clip.files import read_json, sha256_file
from llm2clip.training import checkpoint
from tests.training_kit import TIMES

# what no two runs share: times, and how much of the work an attempt found done
_VOLATILE = {*TIMES, "seconds", "captions_per_second", "embedded", "truncated"}
_TIME = re.compile(r"\b(\d+:)?\d+:\d\d\b|\b\d+(\.\d+)? (s|min|h)\b")
_LEFT_OVER = re.compile(r"\.partial\.\d+|\.old$")


def files(root: Path) -> dict[str, str]:
    """Every file below `root` by its content; of JSON, without the volatile values."""
    assert not left_over(root), left_over(root)
    return {str(file.relative_to(root)): _content(file) for file in sorted(root.rglob("*")) if file.is_file()}


def stores(root: Path) -> dict[str, str]:
    """Every row of the stores below `root` by its address; files of a store may be cut in other ways."""
    assert not left_over(root), left_over(root)
    found: dict[str, str] = {}
    for index in sorted(root.rglob(INDEX_NAME)):
        store = index.parent
        name = str(store.relative_to(root))
        report = verify_store(store)
        assert report.ok and report.complete and not report.stray and not report.duplicates, report
        content = StoreIndex.load(store)
        found[f"{name}: maker"] = json.dumps([content.dim, content.dtype, content.fingerprint])
        for entry in content.shards:
            tensors = map_tensors(store / entry.file, expected_bytes=entry.bytes)
            for number, address in enumerate(np.asarray(tensors["digests"]).reshape(entry.rows, -1)):
                row = [tensors[part][number].tobytes() for part in sorted(tensors) if part in _ROWS]
                found[f"{name}: {address.tobytes().hex()}"] = b"".join(row).hex()
        assert (
            len(EmbeddingStore.open(store)) == len([key for key in found if key.startswith(f"{name}: ")]) - 1
        )
    return found


_ROWS = ("embeddings", "scales")


def left_over(root: Path) -> list[str]:
    """Files that only a process under way may have."""
    return [str(path) for path in root.rglob("*") if _LEFT_OVER.search(path.name)]


def differences(one: dict[str, str], other: dict[str, str]) -> list[str]:
    """Names of the facts that are missing in either or differ."""
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def _content(file: Path) -> str:
    if file.name == checkpoint.META:  # times are in it, and everything it has checksums of is compared itself
        return json.dumps(_stable({k: v for k, v in read_json(file).items() if k != "sha256"}))
    if file.suffix == ".json":
        return json.dumps(_stable(read_json(file)))
    if file.suffix == ".jsonl":
        return json.dumps([_stable(json.loads(line)) for line in file.read_text().splitlines()])
    if file.suffix == ".html":
        return _TIME.sub("TIME", file.read_text(encoding="utf-8"))
    return sha256_file(file)


def _stable(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _stable(inner) for name, inner in value.items() if name not in _VOLATILE}
    return [_stable(inner) for inner in value] if isinstance(value, list) else value


def check_run(out: Path) -> None:
    """The newest checkpoint of a run, if there is one, is complete; so is a result that says so."""
    if (newest := checkpoint.latest(out)) is not None:
        _check_sums(newest)
    if (out / "result" / "DONE").exists():
        assert list((out / "result").glob("*.safetensors")), sorted((out / "result").iterdir())


def _check_sums(folder: Path) -> None:
    sums = read_json(folder / checkpoint.META)["sha256"]
    assert {checkpoint.TENSORS, checkpoint.OPTIMIZER} <= sums.keys()
    for name, expected in sums.items():
        assert sha256_file(folder / name) == expected, folder / name


def check_stores(out: Path) -> None:
    """What the stores below `out` name is there and undamaged."""
    for index in out.rglob(INDEX_NAME):
        report = verify_store(index.parent)
        assert report.ok, report


def check_shards(out: Path) -> None:
    """Shards are whole, and all are there once dataset.json is."""
    for shard in out.glob("*.tar"):
        assert not index_tar(shard).damage, shard
    if (out / "dataset.json").exists():
        for names in read_json(out / "dataset.json")["shards"].values():
            assert all((out / name).exists() for name in names)


def check_json(out: Path) -> None:
    """JSON files, and files of tensors, can be read."""
    for file in out.rglob("*.json"):
        read_json(file)
    for file in out.rglob("*.safetensors"):
        map_tensors(file)


def check_export(out: Path) -> None:
    """A directory that is there has all its files."""
    if out.exists():
        names = {file.name for file in out.iterdir()}
        assert {"config.json", "model.safetensors", "README.md"} <= names, names
        check_json(out)


def digest(facts: dict[str, str]) -> str:
    """One short name of many facts."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
