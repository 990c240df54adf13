"""The readers of files that may come from strangers, each as a function of bytes, with good files to start from."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llm2clip.config import from_tree, load_settings, to_tree
from llm2clip.data.images import decode_image
from llm2clip.data.shards import index_tar, index_tar_python
from llm2clip.data.sources import Source, open_source
from llm2clip.data.store import EmbeddingStore, StoreWriter, verify_store
from llm2clip.data.tensorfile import map_tensors
from llm2clip.errors import BadSampleError, UserError
from llm2clip.files import sha256_file
from llm2clip.models.weights import read_tensors
from llm2clip.settings import OptimSettings, TrainSettings
from llm2clip.training import checkpoint
from llm2clip.training.optim import build_optimizer
from tests.data_files import image_bytes, members_of, write_tar
from tests.reliability.tiny_gguf import write_tiny_gguf

_SAMPLES = 40  # of a source, as many are read


@dataclass(frozen=True)
class Reader:
    """A reader under attack.

    Attributes:
        read: takes the bytes of a file and an empty directory; raises nothing but `llm2clip.errors.UserError`.
        seeds: good files.
    """

    read: Callable[[bytes, Path], None]
    seeds: Callable[[], Sequence[bytes]]


def _all_samples(source: Source) -> None:
    for index in range(min(len(source), _SAMPLES)):
        with contextlib.suppress(BadSampleError):
            assert source.captions_of(index).image is None
        with contextlib.suppress(BadSampleError):
            assert source[index].captions


def read_tar(data: bytes, place: Path) -> None:
    """Both scanners agree, and every sample is good or bad; also where the checksums of the headers are right."""
    file = place / "a.tar"
    file.write_bytes(_sealed(data))
    assert index_tar(file) == index_tar_python(file), "the two scanners differ"
    with contextlib.suppress(UserError):
        _all_samples(open_source(str(file)))
    file.write_bytes(data)
    assert index_tar(file) == index_tar_python(file), "the two scanners differ"
    _all_samples(open_source(str(file)))


def _sealed(data: bytes) -> bytes:
    """The same with right checksums in all that looks like a header, so that a fuzzer comes past them."""
    blocks = [bytearray(data[start : start + 512]) for start in range(0, len(data), 512)]
    for block in blocks:
        if len(block) == 512 and block[257:262] == b"ustar":
            block[148:156] = b" " * 8
            block[148:156] = b"%06o\0 " % sum(block)
    return b"".join(blocks)


def read_jsonl(data: bytes, place: Path) -> None:
    """A table of JSON lines."""
    (place / "a.jsonl").write_bytes(data)
    _all_samples(open_source(str(place / "a.jsonl")))


def read_csv(data: bytes, place: Path) -> None:
    """A CSV table."""
    (place / "a.csv").write_bytes(data)
    _all_samples(open_source(str(place / "a.csv")))


def read_config(data: bytes, place: Path) -> None:
    """A YAML configuration; what is accepted survives a round trip."""
    (place / "a.yaml").write_bytes(data)
    settings = load_settings(TrainSettings, place / "a.yaml")
    again = from_tree(TrainSettings, to_tree(settings))
    assert repr(again) == repr(settings), "dump and load differ"  # not ==: a setting may be nan


def read_image(data: bytes, place: Path) -> None:
    """An encoded image; pixels are bounded, as a fuzzer has little memory."""
    assert decode_image(data, max_pixels=1 << 20).mode == "RGB"


def read_tensorfile(data: bytes, place: Path) -> None:
    """A shard of the embedding store, through our own safetensors reader."""
    (place / "a.safetensors").write_bytes(data)
    for tensor in map_tensors(place / "a.safetensors").values():
        tensor.sum(dtype="f8")


def read_weights(data: bytes, place: Path) -> None:
    """Model weights: a zip archive as .pt, JSON as the index of a sharded model, anything else as safetensors."""
    name = "model.safetensors"
    if data[:2] == b"PK":
        name = "model.pt"
    elif data[:1] == b"{":
        name = "model.safetensors.index.json"
    (place / name).write_bytes(data)
    read_tensors(place if name.endswith(".json") else place / name)


def read_store(data: bytes, place: Path) -> None:
    """An index.json over good shards."""
    for name, content in _store_files().items():
        (place / name).write_bytes(content)
    (place / "index.json").write_bytes(data)
    verify_store(place)
    store = EmbeddingStore.open(place)
    if len(store):
        store.read([0, len(store) - 1])


def read_checkpoint(data: bytes, place: Path) -> None:
    """A checkpoint in which one file is foreign although its checksum is right: an attacker writes that, too."""
    files = dict(_checkpoint_files())
    pointer = b"step_00000004\n"
    if data[:2] == b"PK":
        files[checkpoint.OPTIMIZER] = data
    elif data[:1] == b"{":
        files[checkpoint.META] = data
    elif data[:4] == b"step":
        pointer = data
    else:
        files[checkpoint.TENSORS] = data
    step = place / "checkpoints" / "step_00000004"
    step.mkdir(parents=True)
    (step.parent / "latest").write_bytes(pointer)
    for name, content in files.items():
        (step / name).write_bytes(content)
    if data[:1] != b"{":
        meta = json.loads(files[checkpoint.META])
        meta["sha256"] = {name: sha256_file(step / name) for name in files if name != checkpoint.META}
        (step / checkpoint.META).write_text(json.dumps(meta))
    found = checkpoint.latest(place)
    if found is not None:
        assert found.parent == step.parent, "the pointer led out of the run"
        checkpoint.load(found, *_module())


def read_gguf(data: bytes, place: Path) -> None:
    """A GGUF file as an LLM."""
    from llm2clip.models.llm_files import load_llm

    (place / "a.gguf").write_bytes(data)
    load_llm(place, "a.gguf", torch.float32)


def _module() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    module = nn.Linear(3, 2)
    return module, build_optimizer({"all": list(module.named_parameters())}, OptimSettings())


@cache
def _checkpoint_files() -> dict[str, bytes]:
    module, optimizer = _module()
    module(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    with tempfile.TemporaryDirectory() as folder:
        path = checkpoint.save(Path(folder), module, optimizer, checkpoint.Progress(4, 1, 2, 30, 1.5), 1)
        return {file.name: file.read_bytes() for file in path.iterdir()}


@cache
def _store_files() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        names = [f"caption {number}" for number in range(9)]
        with StoreWriter(folder, dim=4, dtype="int8", fingerprint={"weights": "a"}, shard_rows=5) as out:
            out.add(names, torch.randn(9, 4))
            out.finish()
        return {file.name: file.read_bytes() for file in Path(folder).iterdir() if file.stat().st_size}


def _tar_seeds() -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        file = write_tar(Path(folder) / "a.tar", [*members_of(["1"]), ("a" * 120 + ".txt", b"text")])
        return [file.read_bytes()]


def _jsonl_seeds() -> list[bytes]:
    rows: list[dict[str, Any]] = [
        {"image": "a.png", "caption": "one", "es": {"caption": ["uno", "dos"]}, "group": 3},
        {"caption": "größer"},
    ]
    return ["\n".join(json.dumps(row) for row in rows).encode()]


def _csv_seeds() -> list[bytes]:
    text = io.StringIO()
    csv.writer(text).writerows(
        [["image", "caption", "long"], ["a.png", "a, b", 'two\n"lines"'], ["", "x", ""]]
    )
    return [text.getvalue().encode(), b"\xef\xbb\xbfcaption\na\n"]


def _config_seeds() -> list[bytes]:
    return [
        b"optim: {lr: 1e-3, betas: [0.9, 0.95]}\nrun: &a\n  out: x\n  steps: null\ndata:\n  train: [a, b]\n",
        b"data: {captions: {translations: {es: es.alt}, probabilities: {short: 1, long: 3}}}\nstore: 'it''s'\n",
    ]


def _gguf_seeds() -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        return [write_tiny_gguf(Path(folder) / "a.gguf").read_bytes()]


def _weights_seeds() -> list[bytes]:
    index = {"metadata": {}, "weight_map": {"a": "x.safetensors"}}
    buffer = io.BytesIO()
    torch.save({"state_dict": {"module.weight": torch.ones(2, 3)}}, buffer)
    return [json.dumps(index).encode(), buffer.getvalue(), _checkpoint_files()[checkpoint.TENSORS]]


READERS: dict[str, Reader] = {
    "tar": Reader(read_tar, _tar_seeds),
    "jsonl": Reader(read_jsonl, _jsonl_seeds),
    "csv": Reader(read_csv, _csv_seeds),
    "config": Reader(read_config, _config_seeds),
    "image": Reader(
        read_image, lambda: [image_bytes(kind=kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP")]
    ),
    "tensorfile": Reader(
        read_tensorfile,
        lambda: [data for name, data in _store_files().items() if name.endswith(".safetensors")],
    ),
    "weights": Reader(read_weights, _weights_seeds),
    "store": Reader(read_store, lambda: [_store_files()["index.json"]]),
    "checkpoint": Reader(read_checkpoint, lambda: [*_checkpoint_files().values(), b"step_00000004\n"]),
    "gguf": Reader(read_gguf, _gguf_seeds),
}
