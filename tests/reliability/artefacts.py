"""One good copy of everything that the package writes or reads, to be damaged in copies."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from llm2clip.config import dump_yaml
from llm2clip.data import store_writer
from llm2clip.data.store import StoreWriter
from llm2clip.data.store_lookup import Digests
from llm2clip.search.index import FeatureIndex, build_index
from llm2clip.settings import OptimSettings, TrainSettings
from llm2clip.training import checkpoint
from llm2clip.training.optim import build_optimizer
from tests.data_files import image_bytes, write_shards
from tests.reliability.tiny_gguf import write_tiny_gguf
from tests.tiny_llm2clip import save_both

CAPTIONS = [f"caption {number}" for number in range(2500)]
FINGERPRINT = {"weights": "abc", "pooling": "mean"}
ITEMS = 20


def embeddings(count: int) -> Tensor:
    """The embeddings of the store, (count, 4)."""
    return torch.randn(count, 4, generator=torch.Generator().manual_seed(0))


def training(width: int = 2) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A module and its optimizer, as the checkpoint holds them after a step."""
    torch.manual_seed(0)
    module = nn.Linear(3, width)
    optimizer = build_optimizer({"all": list(module.named_parameters())}, OptimSettings())
    module(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return module, optimizer


def search_index(place: Path, model: str = "one") -> FeatureIndex:
    """Build or open the index of a search over `ITEMS` items."""
    numbers = np.arange(2 * ITEMS, dtype=np.uint64).reshape(ITEMS, 2)
    addresses: Digests = numbers * np.uint64(2**58 + 3)

    def compute(items: Sequence[int]) -> Iterator[tuple[Sequence[int], Tensor]]:
        yield items, embeddings(ITEMS)[list(items)]

    return build_index(place, addresses, compute, dim=4, fingerprint={"model": model}, title="items")


def build_all(root: Path) -> Path:
    """Write every artefact below `root`: one directory each."""
    rows, store_writer._TABLE_ROWS = (
        store_writer._TABLE_ROWS,
        100,
    )  # so small a store has no table of addresses
    try:
        with StoreWriter(
            root / "store", dim=4, dtype="fp32", fingerprint=FINGERPRINT, shard_rows=1250
        ) as out:
            out.add(CAPTIONS, embeddings(len(CAPTIONS)))
            out.finish()
    finally:
        store_writer._TABLE_ROWS = rows
    for step in (4, 8):
        checkpoint.save(root / "checkpoint", *training(), checkpoint.Progress(step, 1, 2, 30, 1.5), 2)
    write_shards(root / "shards", 2, 3)
    table = root / "table"
    table.mkdir()
    (table / "a.png").write_bytes(image_bytes())
    lines = [json.dumps({"image": "a.png", "caption": f"größer {n}"}, ensure_ascii=False) for n in range(3)]
    (table / "captions.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (table / "captions.csv").write_text("image,caption\na.png,größer\na.png,kleiner\n", encoding="utf-8")
    (root / "config").mkdir()
    (root / "config" / "train.yaml").write_text(dump_yaml(TrainSettings()))
    (root / "gguf").mkdir()
    write_tiny_gguf(root / "gguf" / "model.gguf")
    save_both(root / "models")
    search_index(root / "search")
    return root


def copied(root: Path, name: str, place: Path) -> Path:
    """A copy of one artefact."""
    return Path(shutil.copytree(root / name, place / name))
