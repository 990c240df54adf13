"""Thirty and more named corruptions: what each damages, and what the error must say of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from llm2clip.config import load_settings
from llm2clip.data.check import check_source
from llm2clip.data.sources import open_source
from llm2clip.data.store import EmbeddingStore, verify_store
from llm2clip.errors import BadSampleError, StoreError
from llm2clip.models import LLM2CLIP, CaptionEncoder
from llm2clip.models.llm_files import load_llm
from llm2clip.settings import TrainSettings
from llm2clip.training import checkpoint
from tests.reliability import artefacts
from tests.reliability.corruption import Corruption, Damage, Read
from tests.reliability.damage import (
    cut,
    edit_json,
    edit_tensors,
    flip,
    flip_row,
    replace,
    seal_checkpoint,
    seal_store,
    swap,
)


def verify(store: Path) -> None:
    """`llm2clip store verify`."""
    report = verify_store(store)
    if not report.ok:
        raise StoreError(str(report))


def check(data: Path) -> None:
    """`llm2clip data check`: the first bad sample."""
    report = check_source(open_source(str(data)), progress=False)
    if report.bad:
        raise BadSampleError(*report.bad[0])


def resume(run: Path, width: int = 2) -> None:
    """What a restarted run does."""
    found = checkpoint.latest(run)
    assert found is not None
    checkpoint.load(found, *artefacts.training(width))


def run_pickle(place: Path) -> None:
    """An optimizer state that runs code when it is unpickled, with a right checksum."""
    step = place / "checkpoints" / "step_00000008"

    class Harm:
        def __reduce__(self) -> Any:
            return Path.touch, (place / "harmed",)

    torch.save({"state": Harm()}, step / "optimizer.pt")
    seal_checkpoint(step)


STORE = "shard-000001.safetensors"
STEP = "checkpoints/step_00000008"
SHARD, JSON_LINES, CSV = "train-000001.tar", "captions.jsonl", "captions.csv"


def open_store(path: Path) -> None:
    EmbeddingStore.open(path)


def fingerprint(path: Path) -> None:
    EmbeddingStore.open(path).check_fingerprint({"weights": "of another LLM", "pooling": "mean"})


def config(path: Path) -> None:
    load_settings(TrainSettings, path / "train.yaml")


def gguf(path: Path) -> None:
    load_llm(path, "model.gguf", torch.float32)


def llm(path: Path) -> None:
    CaptionEncoder.from_pretrained(path / "llm")


def adapter(path: Path) -> None:
    CaptionEncoder.from_pretrained(path / "llm", adapter=path / "adapter")


def clip(path: Path) -> None:
    LLM2CLIP.from_pretrained(path / "clip")


def lines(path: Path) -> None:
    check(path / JSON_LINES)


def table(path: Path) -> None:
    check(path / CSV)


def _entry(index: dict[str, Any], **values: Any) -> None:
    index["shards"][0].update(values)


def _of(artefact: str, read: Read, *rows: tuple[str, Damage, str, str]) -> list[Corruption]:
    """Corruptions of one artefact that the same reader finds: name, damage, file, place."""
    return [Corruption(name, artefact, damage, read, file, place) for name, damage, file, place in rows]


CORRUPTIONS = [
    *_of(
        "store",
        verify,
        (
            "store: bit of an embedding",
            lambda p: flip_row(p / STORE, "embeddings", 1030),
            STORE,
            "rows 1024–1249",
        ),
        (
            "store: bit of a caption's address",
            lambda p: flip_row(p / STORE, "digests", 3),
            STORE,
            "rows 0–1023",
        ),
        (
            "store: bit of the table of addresses",
            lambda p: flip_row(p / "lookup-000004.safetensors", "low", 7),
            "lookup-000004",
            "checksum",
        ),
        (
            "store: shards exchanged",
            lambda p: swap(p / STORE, p / "shard-000003.safetensors"),
            STORE,
            "checksum",
        ),
        (
            "store: NaN stored with right checksums",
            lambda p: (
                edit_tensors(p / STORE, lambda t: t["embeddings"][1100].fill_(torch.nan)),
                seal_store(p),
            ),
            STORE,
            "NaN[^$]*rows 1024–1249",
        ),
        (
            "store: index leads out of the store",
            lambda p: edit_json(p / "index.json", lambda v: _entry(v, file="../../precious.safetensors")),
            "index.json",
            "precious",
        ),
    ),
    *_of(
        "store",
        open_store,
        (
            "store: bit of a shard's header",
            lambda p: flip(p / STORE, 10),
            STORE,
            "tensors that index.json promises",
        ),
        ("store: shard cut inside its header length", lambda p: cut(p / STORE, 4), STORE, "4 bytes"),
        ("store: shard cut at the end of its header", lambda p: cut(p / STORE, 300), STORE, "300 bytes"),
        ("store: shard cut before its last byte", lambda p: cut(p / STORE, -1), STORE, "expected .* cut"),
        ("store: shard of zero bytes", lambda p: cut(p / STORE, 0), STORE, "0 bytes"),
        ("store: shard missing", lambda p: (p / STORE).unlink(), STORE, "missing"),
        (
            "store: foreign safetensors file",
            lambda p: (swap(p / STORE, p / "lookup-000004.safetensors"), seal_store(p)),
            STORE,
            "tensors that index.json promises",
        ),
        ("store: index cut", lambda p: cut(p / "index.json", 90), "index.json", "line"),
        (
            "store: index in Latin-1",
            lambda p: (p / "index.json").write_bytes('{"a": "ü"}'.encode("latin-1")),
            "index.json",
            "position 7",
        ),
        (
            "store: index promises other rows",
            lambda p: edit_json(p / "index.json", lambda v: _entry(v, rows=1249)),
            STORE,
            "index.json promises",
        ),
        (
            "store: index of a later version",
            lambda p: edit_json(p / "index.json", lambda v: v.update(version=9)),
            "index.json",
            "version 9",
        ),
    ),
    *_of(
        "store",
        fingerprint,
        ("store: made by another encoder", lambda p: None, "store", "weights: stored 'abc'"),
    ),
    *_of(
        "search",
        lambda p: artefacts.search_index(p, "two"),
        ("search index: made by another model", lambda p: None, "search", "model: stored 'one'"),
    ),
    *_of(
        "search",
        verify,
        ("search index: shard of zero bytes", lambda p: cut(p / STORE, 0), STORE, "0 bytes"),
    ),
    *_of(
        "checkpoint",
        resume,
        (
            "checkpoint: bit of the weights",
            lambda p: flip(p / STEP / "trainable.safetensors", -1),
            "trainable.safetensors",
            "SHA-256",
        ),
        (
            "checkpoint: weights of zero bytes",
            lambda p: cut(p / STEP / "trainable.safetensors", 0),
            "trainable.safetensors",
            "SHA-256",
        ),
        (
            "checkpoint: optimizer cut in half",
            lambda p: cut(p / STEP / "optimizer.pt", 900),
            "optimizer.pt",
            "SHA-256",
        ),
        ("checkpoint: optimizer that runs code", run_pickle, "optimizer.pt", "safely"),
        (
            "checkpoint: header of weights lies, checksum right",
            lambda p: (flip(p / STEP / "trainable.safetensors", 6), seal_checkpoint(p / STEP)),
            "trainable.safetensors",
            "header",
        ),
        (
            "checkpoint: files of another step",
            lambda p: (
                edit_tensors(
                    p / "checkpoints/step_00000004/trainable.safetensors", lambda t: t["weight"].add_(1)
                ),
                swap(
                    p / STEP / "trainable.safetensors", p / "checkpoints/step_00000004/trainable.safetensors"
                ),
            ),
            "trainable.safetensors",
            "SHA-256",
        ),
        ("checkpoint: meta.json cut", lambda p: cut(p / STEP / "meta.json", 50), "meta.json", "line"),
        (
            "checkpoint: progress that is no number",
            lambda p: edit_json(p / STEP / "meta.json", lambda v: v["progress"].update(step="8")),
            "meta.json",
            "'step': '8'",
        ),
        (
            "checkpoint: latest names none",
            lambda p: (p / "checkpoints/latest").write_text("step_00000099"),
            "latest",
            "step_00000099",
        ),
        (
            "checkpoint: latest leads out of the run",
            lambda p: (p / "checkpoints/latest").write_text("../../other"),
            "latest",
            "other",
        ),
    ),
    *_of(
        "checkpoint",
        lambda p: resume(p, 5),
        (
            "checkpoint: of another configuration",
            lambda p: None,
            "step_00000008",
            "weight: checkpoint \\(2, 3\\), model \\(5, 3\\)",
        ),
    ),
    *_of(
        "shards",
        check,
        (
            "shard: cut inside a member",
            lambda p: cut(p / SHARD, 540),
            SHARD,
            "cut inside member '.*' at byte",
        ),
        (
            "shard: cut inside a header",
            lambda p: cut(p / SHARD, 2 * 1024 + 100),
            SHARD,
            "cut inside a header at byte 2048",
        ),
        (
            "shard: bit of a header",
            lambda p: flip(p / SHARD, 2 * 1024 + 3),
            SHARD,
            "damaged header at byte 2048",
        ),
        (
            "shard: bytes of an image",
            lambda p: replace(p / SHARD, b"IDAT", b"IDAX"),
            "train-000001/1x0000",
            "image is not",
        ),
        (
            "shard: JSON in Latin-1",
            lambda p: replace(p / SHARD, b"caption of", b"caption \xfcf"),
            "train-000001/1x0000",
            "position 21",
        ),
        (
            "shard: of zero bytes, alone",
            lambda p: (cut(p / SHARD, 0), (p / "train-000000.tar").unlink()),
            "shards",
            "found no members",
        ),
    ),
    *_of(
        "table",
        lines,
        ("jsonl: half a line", lambda p: cut(p / JSON_LINES, -9), f"{JSON_LINES}:3", "JSON"),
        (
            "jsonl: Latin-1",
            lambda p: replace(p / JSON_LINES, "größer".encode(), "größer".encode("latin-1")),
            f"{JSON_LINES}:1",
            "position",
        ),
        ("jsonl: image cut", lambda p: cut(p / "a.png", 40), f"{JSON_LINES}:1", "image is not"),
    ),
    *_of(
        "table",
        table,
        (
            "csv: Latin-1",
            lambda p: replace(p / CSV, "größer".encode(), "größer".encode("latin-1")),
            CSV,
            "position",
        ),
        ("csv: of zero bytes", lambda p: cut(p / CSV, 0), CSV, "0 rows"),
    ),
    *_of(
        "config",
        config,
        (
            "config: cut inside a value",
            lambda p: (p / "train.yaml").write_text("run: {out: [a, b"),
            "train.yaml",
            "line 1",
        ),
        (
            "config: name of a setting",
            lambda p: replace(p / "train.yaml", b"batch_size", b"batch_sise"),
            "train.yaml",
            "run.batch_sise",
        ),
        (
            "config: no text",
            lambda p: (p / "train.yaml").write_bytes(b"\xff\xfe"),
            "train.yaml",
            "position 0",
        ),
    ),
    *_of(
        "gguf",
        gguf,
        (
            "GGUF: cut inside its header",
            lambda p: cut(p / "model.gguf", 200),
            "model.gguf",
            "buffer size is 200",
        ),
        ("GGUF: cut inside its tensors", lambda p: cut(p / "model.gguf", -700), "model.gguf", "Error"),
        ("GGUF: of zero bytes", lambda p: cut(p / "model.gguf", 0), "model.gguf", "Error"),
    ),
    *_of(
        "models",
        llm,
        ("LLM: weights cut", lambda p: cut(p / "llm/model.safetensors", -5), "llm", "SafetensorError"),
        ("LLM: configuration cut", lambda p: cut(p / "llm/config.json", 40), "config.json", "line"),
    ),
    *_of(
        "models",
        adapter,
        (
            "adapter: weights cut",
            lambda p: cut(p / "adapter/adapter_model.safetensors", 100),
            "adapter",
            "SafetensorError",
        ),
        (
            "adapter: weights missing",
            lambda p: (p / "adapter/adapter_model.safetensors").unlink(),
            "adapter",
            "adapter_model.safetensors",
        ),
        (
            "adapter: base changed since",
            lambda p: edit_tensors(p / "llm/model.safetensors", lambda t: next(iter(t.values())).add_(1)),
            "adapter",
            "base",
        ),
    ),
    *_of(
        "models",
        clip,
        (
            "model: weights cut",
            lambda p: cut(p / "clip/model.safetensors", -5),
            "model.safetensors",
            "half-copied",
        ),
        (
            "model: a weight missing",
            lambda p: edit_tensors(p / "clip/model.safetensors", lambda t: t.pop("logit_scale")),
            "model.safetensors",
            "logit_scale",
        ),
        (
            "model: configuration without a part",
            lambda p: edit_json(p / "clip/config.json", lambda v: v.pop("vision")),
            "config.json",
            "vision",
        ),
    ),
]
