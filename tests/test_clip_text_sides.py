"""The CLIP stage with every text side: stored, online and joint LLM, CLIP's own text tower; and from a run's result."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llm2clip.config import from_tree
from llm2clip.data.store import EmbeddingStore
from llm2clip.embed import embed
from llm2clip.errors import ConfigError, StoreError
from llm2clip.models.caption_encoder import CaptionEncoder
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.settings import EmbedSettings, TrainSettings
from llm2clip.training.clip_task import ClipTask
from llm2clip.training.run import train_clip
from tests.tiny_models import save_tiny_clip
from tests.training_kit import ALONE, Kit, assert_same_run, curve, make_kit


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Kit:
    kit = make_kit(tmp_path_factory.mktemp("kit"))
    save_tiny_clip(kit.root / "clip")
    return kit


def with_llm(settings: TrainSettings, kit: Kit, source: str, **more: Any) -> TrainSettings:
    text = from_tree(
        TrainSettings, {"text": {"source": source, "llm": {"path": str(kit.root / "llm")}} | more}
    ).text
    return replace(settings, store="", text=text)


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in curve(out) if "loss" in line]


@pytest.mark.parametrize("micro_batch", [0, 3])
def test_an_online_llm_trains_like_its_store(kit: Kit, tmp_path: Path, micro_batch: int) -> None:
    job = EmbedSettings(
        data=kit.clip_stage(tmp_path).data,
        llm=with_llm(kit.clip_stage(tmp_path), kit, "online").text.llm,
        out=str(tmp_path / "store"),
        dtype="fp32",
        device="cpu",
    )
    embed(job)
    options: dict[str, Any] = {"dropout": 0.0, "micro_batch": micro_batch, "eval_every": 3}
    stored = kit.clip_stage(tmp_path / "stored", store=str(tmp_path / "store"), **options)
    train_clip(stored)
    train_clip(with_llm(kit.clip_stage(tmp_path / "online", **options), kit, "online"))
    for one, other in zip(curve(tmp_path / "stored"), curve(tmp_path / "online"), strict=True):
        assert one.keys() == other.keys()
        assert one == pytest.approx(other, rel=1e-3, abs=1e-4)
    # held-out retrieval came from the LLM itself
    assert "val/short/t2i_r1" in curve(tmp_path / "online")[-1]
    results = [LLM2CLIP.from_pretrained(tmp_path / run / "result") for run in ("stored", "online")]
    assert results[0].fingerprint == results[1].fingerprint


def test_a_joint_llm_learns_and_its_adapter_is_exported(kit: Kit, tmp_path: Path) -> None:
    options: dict[str, Any] = {"dropout": 0.0, "steps": 8, "lr": 1e-2, "micro_batch": 3}
    settings = with_llm(
        kit.clip_stage(tmp_path / "run", **options), kit, "joint", lora={"rank": 2, "dropout": 0.0}
    )
    task = ClipTask(settings, ALONE)
    assert "lora" in task.groups() and all(p.requires_grad for n, p in task.groups()["lora"] if ".lora_" in n)
    result = train_clip(settings)
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]
    tuned = CaptionEncoder.from_pretrained(kit.root / "llm", adapter=result / "llm_adapter")
    base = CaptionEncoder.from_pretrained(kit.root / "llm")
    assert (tuned.encode(["red stone 0"]) - base.encode(["red stone 0"])).abs().max() > 1e-3


@pytest.mark.parametrize("use", ["two_losses", "three_losses", "concat"])
def test_clips_own_text_tower_is_trained_beside_the_llm(kit: Kit, tmp_path: Path, use: str) -> None:
    clip_text = {"use": use, "path": str(kit.root / "clip")}
    options: dict[str, Any] = {"dropout": 0.0, "steps": 6, "lr": 1e-2}

    def settings(out: str, **more: Any) -> TrainSettings:
        base = kit.clip_stage(tmp_path / out, loss={"clip_text": 0.5}, **options, **more)
        model = from_tree(TrainSettings, {"model": {"clip_text": clip_text}}).model.clip_text
        return replace(base, model=replace(base.model, clip_text=model))

    result = train_clip(settings("whole"))
    lines = [line for line in curve(tmp_path / "whole") if "loss" in line]
    named = {
        "two_losses": {"loss_clip_text"},
        "three_losses": {"loss_clip_text", "loss_texts"},
        "concat": set(),
    }
    assert {name for name in lines[0] if name.startswith("loss_")} == named[use] | (
        {"loss_contrastive"} if named[use] else set()
    )
    assert lines[-1]["loss"] < lines[0]["loss"]
    # the tower itself moved, and is part of the result
    tensors, start = (
        load_file(result / "model.safetensors"),
        ClipTask(settings("fresh"), ALONE).model.state_dict(),
    )
    assert any(
        not torch.equal(tensors[n], start[n]) for n in tensors if n.startswith("clip_text.") and n in start
    )
    train_clip(settings("cached", micro_batch=3))
    for one, other in zip(curve(tmp_path / "whole"), curve(tmp_path / "cached"), strict=True):
        assert one == pytest.approx(other, rel=5e-4, abs=5e-5)
    # joined features have no retrieval without both towers, which a log of training does not have
    assert ("val/short/t2i_r1" in curve(tmp_path / "whole")[-1]) == (use != "concat")


def test_a_first_stage_is_where_the_second_begins(kit: Kit, tmp_path: Path) -> None:
    first = train_clip(kit.clip_stage(tmp_path / "first", steps=3))
    more = {"model": {"init": str(first), "vision": {"image_size": 8}}, "teacher": {"start": True}}
    more["loss"] = {"distill": {"tower": {"mse": 1.0}}}
    settings = kit.clip_stage(tmp_path / "second", more, steps=4, dropout=0.0)
    task = ClipTask(settings, ALONE)
    for name, tensor in LLM2CLIP.from_pretrained(first).state_dict().items():
        assert torch.equal(task.model.state_dict()[name], tensor), name
    train_clip(settings)
    # a resumed run goes on from its checkpoint, and its teacher is the start, not what it has become
    from llm2clip.training.loop import train
    from tests.test_training_tasks import interrupt
    from tests.training_kit import Interrupted

    cut = kit.clip_stage(tmp_path / "cut", more, steps=4, dropout=0.0)
    with pytest.raises(Interrupted):
        train(interrupt(ClipTask(cut, ALONE), 3), cut.run, cut.optim, ALONE)
    train_clip(cut)
    assert_same_run(tmp_path / "second", tmp_path / "cut")


def test_text_sides_that_contradict_each_other(kit: Kit, tmp_path: Path) -> None:
    online = with_llm(kit.clip_stage(tmp_path / "run"), kit, "online")
    with pytest.raises(ConfigError, match=r"store: with text\.source online the LLM embeds, leave it empty"):
        ClipTask(replace(online, store=str(kit.root / "store")), ALONE)
    with pytest.raises(ConfigError, match=r"run\.parallel: with text\.source online"):
        replace(online, run=replace(online.run, parallel="fsdp"))
    train_clip(replace(online, run=replace(online.run, steps=2, save_every=1)))
    (tmp_path / "run" / "result" / "DONE").unlink()
    other = replace(online, text=replace(online.text, llm=replace(online.text.llm, prompt="another: ")))
    with pytest.raises(
        StoreError, match="another encoder than those that the run in .* began with:\n  prompt"
    ):
        ClipTask(other, ALONE)
    assert EmbeddingStore.open(kit.root / "store").dim == ClipTask(online, ALONE).model.llm_dim
