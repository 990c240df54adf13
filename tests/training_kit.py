"""What the training tests share: a toy task for the loop, and tiny data and models for both stages."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from llm2clip.config import from_tree
from llm2clip.data.loader import Position
from llm2clip.embed import embed
from llm2clip.settings import EmbedSettings, FinetuneLLMSettings, OptimSettings, RunSettings, TrainSettings
from llm2clip.training import checkpoint
from llm2clip.training.loop import train
from llm2clip.training.metrics import read_metrics
from llm2clip.training.world import World
from tests.data_files import write_tar
from tests.tiny_models import save_tiny

ALONE = World(0, 1, torch.device("cpu"))
OPTIM = OptimSettings(lr=1e-2, warmup_steps=2)
# time measured by a run, which no two runs share
TIMES = {"samples_per_second", "data_wait", "tflops", "mfu", "peak_memory_mib"}


class Interrupted(Exception):
    """Ends a run from inside, where a test wants it."""


@dataclass
class Hooks:
    """What a test does inside a toy run; each function gets the number of optimizer steps this process did."""

    before_loss: Callable[[int], None] = lambda step: None
    change_loss: Callable[[int, Tensor], Tensor] = lambda step, loss: loss
    on_export: Callable[[Path], None] = lambda path: None
    samples: Callable[[Position, list[int]], list[int]] = lambda position, samples: samples
    metrics: dict[str, float] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)


class Toy(nn.Module):
    """Regression with dropout and a buffer that training changes."""

    seen: Tensor

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(4, width), nn.Tanh(), nn.Dropout(0.3), nn.Linear(width, 1, bias=False)
        )
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        self.seen += len(x)
        return {"y": self.net(x)}


class ToyTask:
    """A task without files: sample i is a row of a fixed matrix."""

    title = "toy"
    token_budget = 0
    additive, sharded = False, False

    def __init__(
        self, run: RunSettings, hooks: Hooks | None = None, *, width: int = 6, size: int = 20
    ) -> None:
        torch.manual_seed(3)
        self.settings: Any = from_tree(FinetuneLLMSettings, {})
        self.run, self.hooks, self.samples = run, hooks or Hooks(), size
        self.module: nn.Module = Toy(width)
        self.rows = torch.randn(size, 4, generator=torch.Generator().manual_seed(0))
        self.steps = 0

    def groups(self) -> Mapping[str, Any]:
        return {"all": list(self.module.named_parameters())}

    def batches(self, epoch: int, batch: int) -> Iterator[tuple[Position, Sequence[int]]]:
        self.hooks.calls.append("batches")
        size = self.run.batch_size
        while True:
            order = np.random.default_rng([7, epoch]).permutation(self.samples).tolist()
            for start in range(batch * size, self.samples - size + 1, size):
                batch += 1
                last = start + 2 * size > self.samples
                position = Position(epoch + 1, 0) if last else Position(epoch, batch)
                yield position, self.hooks.samples(position, order[start : start + size])
            epoch, batch = epoch + 1, 0

    def chunks(self, samples: Sequence[int], size: int) -> Sequence[Tensor]:
        return list(self.rows[list(samples)].split(size or len(samples)))

    def loss(self, outputs: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        self.hooks.before_loss(self.steps)
        loss = self.hooks.change_loss(self.steps, (outputs["y"] - 1.0).square().mean())
        return loss, {"mean": outputs["y"].detach().mean()}

    def after_step(self) -> None:
        self.steps += 1

    def names(self, samples: Sequence[int]) -> list[str]:
        return [f"key{sample}" for sample in samples]

    def evaluate(self) -> dict[str, float]:
        self.hooks.calls.append("evaluate")
        return dict(self.hooks.metrics)

    def export(self, path: Path) -> None:
        self.hooks.calls.append("export")
        self.hooks.on_export(path)
        path.mkdir(exist_ok=True)
        (path / "weights").write_text(repr([p.tolist() for p in self.module.parameters()]))


def toy_run(out: Path, hooks: Hooks | None = None, *, width: int = 6, size: int = 20, **run: Any) -> ToyTask:
    """Train a toy to its end and return it."""
    settings = RunSettings(
        **{"out": str(out), "steps": 12, "batch_size": 6, "log_every": 1, "save_every": 5, **run}
    )
    task = ToyTask(settings, hooks, width=width, size=size)
    train(task, settings, OPTIM, ALONE)
    return task


def stop_at(step: int) -> Hooks:
    """Raise Interrupted inside step `step` (0-based, counted by this process)."""

    def raise_there(now: int) -> None:
        if now == step:
            raise Interrupted

    return Hooks(before_loss=raise_there)


def curve(out: Path) -> list[dict[str, Any]]:
    """The metrics of a run without measured times."""
    return [{k: v for k, v in line.items() if k not in TIMES} for line in read_metrics(out / "metrics.jsonl")]


def newest_tensors(out: Path) -> dict[str, Tensor]:
    """The tensors of the newest checkpoint."""
    from safetensors.torch import load_file

    newest = checkpoint.latest(out)
    assert newest is not None
    return load_file(newest / checkpoint.TENSORS)


def assert_same_run(one: Path, other: Path) -> None:
    """Two finished runs have bitwise equal weights, and metrics lines that say the same, in the same order."""
    mine, theirs = newest_tensors(one), newest_tensors(other)
    assert mine.keys() == theirs.keys()
    different = [name for name in mine if not torch.equal(mine[name], theirs[name])]
    assert different == []
    assert curve(one) == curve(other)


def picture(number: int, size: int = 12) -> bytes:
    """A picture that shows its number: two colours in a pattern."""
    rng = np.random.default_rng(number)
    pixels = np.kron(rng.integers(0, 255, (2, 2, 3)), np.ones((size // 2, size // 2, 1))).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def records(count: int, start: int = 0) -> list[dict[str, Any]]:
    """Captions of entities with names, descriptions and Spanish names, each one different."""
    kinds = ("red stone", "old coat", "fast car", "tall tree", "iron key")
    return [
        {
            "group": f"entity{number}",
            "name": f"{kinds[number % 5]} {number}",
            "description": f"This is the {kinds[number % 5]} with number {number}, of {number % 3} kinds.",
            "es": {"name": f"cosa {number}"},
        }
        for number in range(start, start + count)
    ]


def write_set(path: Path, entries: Sequence[Mapping[str, Any]], start: int = 0) -> Path:
    """A tar shard of pictures and JSON records."""
    path.parent.mkdir(parents=True, exist_ok=True)
    members: list[tuple[str, bytes]] = []
    for number, record in enumerate(entries, start):
        members += [
            (f"{number:04d}.png", picture(number)),
            (f"{number:04d}.json", json.dumps(record).encode()),
        ]
    return write_tar(path, members)


CLIP_VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 24,
    "patch_size": 4,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "attention_dropout": 0.1,
}


@dataclass(frozen=True)
class Kit:
    """Tiny shards, a tiny LLM, an embedding store and a tiny vision tower in one folder."""

    root: Path

    def data(self) -> dict[str, Any]:
        """The `data` group of the settings."""
        captions = {"short": "name", "long": "description", "translations": {"es": "es.name"}}
        return {
            "train": [str(p) for p in sorted(self.root.glob("data/train-*.tar"))],
            "val": [str(self.root / "data" / "val-000000.tar")],
            "captions": captions,
        }

    def llm_stage(self, out: Path, **run: Any) -> FinetuneLLMSettings:
        """Settings of a tiny LLM stage with dropout."""
        tree = {
            "data": self.data() | {"workers": run.pop("workers", 0)},
            "llm": {"path": str(self.root / "llm")},
            "lora": {"rank": 2, "dropout": run.pop("dropout", 0.2)},
            "optim": {"lr": run.pop("lr", 1e-3), "warmup_steps": 2},
            "run": self._run(out, run),
        }
        return from_tree(FinetuneLLMSettings, tree)

    def clip_stage(self, out: Path, more: Mapping[str, Any] | None = None, **run: Any) -> TrainSettings:
        """Settings of a tiny CLIP stage with dropout; `more` is merged into their groups."""
        dropout = run.pop("dropout", 0.2)
        config = CLIP_VISION | {"attention_dropout": dropout / 2}
        (self.root / f"vision-{dropout}.json").write_text(json.dumps(config))
        tree: dict[str, Any] = {
            "data": self.data() | {"workers": run.pop("workers", 0)} | run.pop("data", {}),
            "store": run.pop("store", str(self.root / "store")),
            "model": {
                "vision": {
                    "kind": "transformers",
                    "path": str(self.root / f"vision-{dropout}.json"),
                    "image_size": 8,
                },
                "embed_dim": run.pop("embed_dim", 8),
                "adapter_depth": 1,
                "adapter_dropout": dropout,
                "adapter_noise": dropout,
            },
            "loss": run.pop("loss", {}),
            "optim": {"lr": run.pop("lr", 1e-3), "warmup_steps": 2},
            "run": self._run(out, run),
        }
        for group, values in (more or {}).items():
            known = tree.get(group, {})
            tree[group] = {**known, **values} if isinstance(values, Mapping) else values
        return from_tree(TrainSettings, tree)

    @staticmethod
    def _run(out: Path, run: Mapping[str, Any]) -> dict[str, Any]:
        common = {
            "steps": 6,
            "batch_size": 8,
            "log_every": 1,
            "save_every": 2,
            "device": "cpu",
            "peak_tflops": 0,
        }
        return {"out": str(out), **common, **run}


def make_kit(root: Path) -> Kit:
    """Write everything a tiny run of either stage needs."""
    for shard in range(2):
        write_set(root / "data" / f"train-{shard:06d}.tar", records(20, 20 * shard), 20 * shard)
    write_set(root / "data" / "val-000000.tar", records(12, 100), 100)
    save_tiny(root / "llm")
    kit = Kit(root)
    tree = {
        "data": kit.data(),
        "llm": {"path": str(root / "llm")},
        "out": str(root / "store"),
        "device": "cpu",
    }
    embed(from_tree(EmbedSettings, tree))
    return kit


def wait_for(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    """Poll until `condition`; fails after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "what the test waits for did not happen"
        time.sleep(0.005)
