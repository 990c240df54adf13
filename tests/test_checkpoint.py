"""Checkpoints: complete or absent, checked, never unpickled; and the metrics log that goes with them."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from llm2clip.errors import CheckpointError
from llm2clip.files import sha256_file
from llm2clip.settings import OptimSettings
from llm2clip.training import checkpoint
from llm2clip.training.metrics import MetricsLog, read_metrics
from llm2clip.training.optim import build_optimizer


class Model(nn.Module):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.net = nn.Linear(2, width)
        self.norm = nn.BatchNorm1d(width)
        self.register_buffer("cache", torch.zeros(2), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.net(self.frozen(x)))


def build(width: int = 3, **options: Any) -> tuple[Model, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Model(width)
    return model, build_optimizer({"all": list(model.named_parameters())}, OptimSettings(**options))


def step(model: Model, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.randn(5, 2)).square().sum().backward()
    optimizer.step()


def save(directory: Path, at: int = 4, keep: int = 2) -> tuple[Model, torch.optim.Optimizer, Path]:
    model, optimizer = build()
    step(model, optimizer)
    progress = checkpoint.Progress(step=at, epoch=1, batch=2, samples=30, seconds=1.5)
    return model, optimizer, checkpoint.save(directory, model, optimizer, progress, keep)


def test_round_trip(tmp_path: Path) -> None:
    model, optimizer, path = save(tmp_path)
    assert checkpoint.latest(tmp_path) == path
    other, fresh = build()
    with torch.no_grad():
        for parameter in other.net.parameters():
            parameter.add_(1.0)
    assert checkpoint.load(path, other, fresh) == checkpoint.Progress(4, 1, 2, 30, 1.5)
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    assert other.norm.num_batches_tracked is not None and other.norm.num_batches_tracked.item() == 1
    torch.manual_seed(1)
    step(model, optimizer)
    torch.manual_seed(1)
    step(other, fresh)
    assert torch.equal(model.net.weight, other.net.weight)


def test_only_what_training_changes_is_stored(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    _, _, path = save(tmp_path)
    names = set(load_file(path / checkpoint.TENSORS))
    assert names == {
        *("net.weight", "net.bias", "norm.weight", "norm.bias"),
        *("norm.running_mean", "norm.running_var", "norm.num_batches_tracked"),
    }


def test_rates_and_decay_come_from_the_settings(tmp_path: Path) -> None:
    _, _, path = save(tmp_path)
    model, optimizer = build(weight_decay=0.5, eps=1e-3)
    checkpoint.load(path, model, optimizer)
    assert optimizer.param_groups[0]["weight_decay"] == 0.5 and optimizer.param_groups[0]["eps"] == 1e-3
    assert optimizer.state[model.net.weight]["exp_avg"].abs().max() > 0


@pytest.mark.parametrize("name", [checkpoint.TENSORS, checkpoint.OPTIMIZER])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_damage_is_found(tmp_path: Path, name: str, damage: str) -> None:
    _, _, path = save(tmp_path)
    data = bytearray((path / name).read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
    (path / name).write_bytes(data if damage == "flip" else data[:-7])
    if damage == "gone":
        (path / name).unlink()
    model, optimizer = build()
    before = model.net.weight.clone()
    with pytest.raises(CheckpointError, match=f"{name} is damaged"):
        checkpoint.load(path, model, optimizer)
    assert torch.equal(before, model.net.weight)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"progress": {"stepp": 1}, "sha256": {}}'])
def test_damaged_meta_is_found(tmp_path: Path, text: str) -> None:
    _, _, path = save(tmp_path)
    (path / checkpoint.META).write_text(text)
    with pytest.raises(CheckpointError, match=checkpoint.META):
        checkpoint.load(path, *build())


class Harm:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path("harmed"),))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _, _, path = save(tmp_path)
    # somebody who can write the file can write its checksum too
    for harmful in (
        lambda file: file.write_bytes(pickle.dumps(Harm())),
        lambda file: torch.save(Harm(), file),
    ):
        harmful(path / checkpoint.OPTIMIZER)
        meta = json.loads((path / checkpoint.META).read_text())
        meta["sha256"][checkpoint.OPTIMIZER] = sha256_file(path / checkpoint.OPTIMIZER)
        (path / checkpoint.META).write_text(json.dumps(meta))
        with pytest.raises(CheckpointError, match="cannot be read safely"):
            checkpoint.load(path, *build())
    assert not Path("harmed").exists()


def test_another_model_is_listed(tmp_path: Path) -> None:
    _, _, path = save(tmp_path)
    with pytest.raises(CheckpointError, match=r"net\.weight: checkpoint \(3, 2\), model \(5, 2\)"):
        checkpoint.load(path, *build(5))
    model = Model()
    model.more = nn.Linear(1, 1)
    with pytest.raises(CheckpointError, match=r"2 missing in it: more\.bias, more\.weight"):
        checkpoint.load(path, model, build()[1])
    model, _ = build()
    model.net.requires_grad_(False)
    with pytest.raises(CheckpointError, match=r"2 unknown to the model: net\.bias, net\.weight"):
        checkpoint.load(path, model, build()[1])


def test_other_parameter_groups_are_refused(tmp_path: Path) -> None:
    _, _, path = save(tmp_path)
    model, _ = build()
    one_group = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    with pytest.raises(CheckpointError, match="parameter groups differ"):
        checkpoint.load(path, model, one_group)


def test_old_checkpoints_and_leftovers_go(tmp_path: Path) -> None:
    for at in (2, 4, 6):
        save(tmp_path, at)
        (tmp_path / "checkpoints" / f"step_{at:08d}.partial.4194304").mkdir(exist_ok=True)
        (tmp_path / "checkpoints" / f"step_{at:08d}.old").mkdir(exist_ok=True)
    save(tmp_path, 8, keep=3)
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["latest", "step_00000004", "step_00000006", "step_00000008"]
    assert save(tmp_path, 8)[2].is_dir()  # the same step again replaces it


def test_what_a_kill_left_goes_at_the_next_start(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        save(tmp_path, step, keep=9)
    root = tmp_path / "checkpoints"
    (root / "step_00000008.partial.7").mkdir()
    checkpoint.prune(tmp_path, 4)
    assert sorted(os.listdir(root)) == ["latest", "step_00000002", "step_00000004", "step_00000006"]
    checkpoint.prune(tmp_path, 2)
    assert sorted(os.listdir(root)) == ["latest", "step_00000004", "step_00000006"]
    # one that was chosen by hand stays, and so does the only copy of what was being replaced
    (root / "latest").write_text("step_00000004\n")
    checkpoint.prune(tmp_path, 1)
    assert sorted(os.listdir(root)) == ["latest", "step_00000004"]
    (root / "step_00000004").rename(root / "step_00000004.old")
    checkpoint.prune(tmp_path, 1)
    assert sorted(os.listdir(root)) == ["latest", "step_00000004.old"]
    checkpoint.prune(tmp_path / "nothing", 1)


def test_latest(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path) is None
    _, _, path = save(tmp_path)
    # killed between the two renames of a replacement
    path.rename(path.with_name(path.name + ".old"))
    aside = checkpoint.latest(tmp_path)
    assert aside is not None and aside.name == "step_00000004.old"
    assert checkpoint.load(aside, *build()).step == 4
    aside.rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="step_00000004, which does not exist"):
        checkpoint.latest(tmp_path)


def test_metrics_go_on_from_a_step(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    for at in range(1, 6):
        log.write(at, {"loss": 1.0 / at, "grad_norm": float("inf") if at == 2 else 1.0})
    log.write(3, {"val": 0.5})
    log.write(3, {})
    with open(tmp_path / "metrics.jsonl", "a") as handle:
        handle.write('{"step": 6, "lo')  # killed while it wrote
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 6
    again = MetricsLog(tmp_path, start=3)
    again.write(3, {"val": 0.25})
    again.write(4, {"loss": 9.0})
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [(line["step"], line.get("loss"), line.get("val")) for line in lines] == [
        (1, 1.0, None), (2, 0.5, None), (3, 1 / 3, None), (3, None, 0.5), (4, 9.0, None),
    ]  # fmt: skip
    assert lines[1]["grad_norm"] is None
    MetricsLog(tmp_path / "none", enabled=False).write(1, {"loss": 1.0})
    assert not (tmp_path / "none").exists()
