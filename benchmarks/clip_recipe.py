"""The recipe that `bench_clip_step` gives to every trainer: data, an embedding store, settings of the CLIP stage."""

from __future__ import annotations

import argparse
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.captions import OPENSTAX
from llm2clip.config import from_tree
from llm2clip.data.sources import open_source
from llm2clip.data.store import EmbeddingStore, StoreWriter
from llm2clip.errors import BadSampleError
from llm2clip.settings import TrainSettings

# ViTs with random weights: a small tower without batch norms, and the paper's large one
_VITS: dict[str, dict[str, Any]] = {
    "vit": {
        "model_type": "vit", "hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 12,
        "num_attention_heads": 3, "patch_size": 16,
    },
    "vit-l-14": {
        "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
        "num_attention_heads": 16, "patch_size": 14, "projection_dim": 768,
    },
}  # fmt: skip
TOWERS = ("efficientnet-lite0", *_VITS)
CAPTIONS = {"short": "caption", "long": "alt"}


def shards(folder: Path, data: Path, count: int) -> tuple[list[str], str]:
    """Shards with at least `count` images and captions, and where they are from.

    Args:
        folder: where random images are written when `data` has none.
        data: folder of WebDataset tars.
        count: images needed.
    """
    found = sorted(str(path) for path in data.glob("*train*.tar"))
    if found and len(open_source(found)) >= count:
        return found, data.name
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    path = folder / "random-train-000000.tar"
    with tarfile.open(path, "w") as tar:
        for number in range(count):
            coarse = Image.fromarray(rng.integers(0, 255, (12, 16, 3), dtype=np.uint8))
            buffer = io.BytesIO()
            coarse.resize((170, 128), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
            record = {"caption": f"picture {number}", "alt": f"a longer text of picture {number}"}
            for name, content in (("jpg", buffer.getvalue()), ("json", json.dumps(record).encode())):
                info = tarfile.TarInfo(f"{number:06d}.{name}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return [str(path)], "random images"


def caption_texts(paths: list[str], limit: int | None = None) -> list[str]:
    """Every different caption and description of the shards, or of their first `limit` samples."""
    source = open_source(paths, limit=limit)
    texts: dict[str, None] = {}
    for index in range(len(source)):
        try:
            sample = source.captions_of(index)
        except BadSampleError:
            continue
        for field in CAPTIONS.values():
            texts |= dict.fromkeys(sample.captions.get(field, ()))
    return list(texts)


def random_store(folder: Path, paths: list[str], dim: int, limit: int) -> EmbeddingStore:
    """Random embeddings of every caption: a step takes as long with them as with an LLM's."""
    texts = caption_texts(paths, limit)
    generator = torch.Generator().manual_seed(0)
    with StoreWriter(folder, dim=dim, dtype="fp16", fingerprint={"features": "random"}) as writer:
        writer.add(texts, torch.randn(len(texts), dim, generator=generator))
        writer.finish()
    return EmbeddingStore.open(folder)


def settings(options: argparse.Namespace, folder: Path, paths: list[str], limit: int) -> TrainSettings:
    """The CLIP stage of the paper on a small tower; no dropout, so that every trainer has the same losses."""
    vision: dict[str, Any] = {"kind": "efficientnet-lite0", "image_size": options.image_size}
    if options.tower in _VITS:
        config = folder / f"{options.tower}.json"
        config.write_text(json.dumps(_VITS[options.tower] | {"image_size": options.image_size}))
        vision = {"kind": "transformers", "path": str(config), "image_size": options.image_size}
    tree = {
        "data": {"train": paths, "captions": CAPTIONS, "workers": options.workers, "limit": limit},
        "store": str(folder / "store"),
        "model": {"vision": vision, "embed_dim": 512, "adapter_depth": options.adapter_depth},
        "loss": {"duplicates": "keep"},
        "optim": {"lr": 1e-3, "warmup_steps": 2, "grad_clip": 1.0},
        "run": {
            "out": str(folder / "run"),
            "steps": options.steps,
            "batch_size": options.batch,
            "micro_batch": options.micro_batch,
            "precision": options.dtype,
            "log_every": 1,
            "save_every": 10**6,
            # not counted on a CPU, whose peak is unknown
            "peak_tflops": None if torch.cuda.is_available() else 0,
        },
    }
    return from_tree(TrainSettings, tree)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options that describe the recipe."""
    parser.add_argument("--batch", type=int, default=64, help="images of a step")
    parser.add_argument("--micro-batch", type=int, default=0, help="images of a forward pass; 0: the batch")
    parser.add_argument("--steps", type=int, default=6, help="measured steps")
    parser.add_argument("--tower", default="efficientnet-lite0", choices=TOWERS)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--llm-dim", type=int, default=576, help="width of the LLM embeddings")
    parser.add_argument("--adapter-depth", type=int, default=4)
    parser.add_argument("--workers", type=int, default=0, help="data-loader processes, the same for all")
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--data", type=Path, default=OPENSTAX, help="folder of WebDataset tars")
