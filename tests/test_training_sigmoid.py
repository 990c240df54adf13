"""The CLIP stage with the sigmoid loss: its first values, the gradient cache, learning, saving and loading."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llm2clip.config import from_tree
from llm2clip.errors import ConfigError
from llm2clip.files import read_json, write_json
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.settings import ModelSettings, TrainSettings
from llm2clip.training.clip_task import ClipTask
from llm2clip.training.run import train_clip
from llm2clip_kernels.sigmoid_loss import sigmoid_loss_reference
from tests.training_kit import ALONE, Kit, curve, make_kit


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Kit:
    return make_kit(tmp_path_factory.mktemp("kit"))


def sigmoid_stage(kit: Kit, out: Path, **run: Any) -> TrainSettings:
    return kit.clip_stage(out, loss={"kind": "sigmoid"}, **run)


def test_scale_and_bias_start_where_the_loss_has_them(kit: Kit, tmp_path: Path) -> None:
    model = ClipTask(sigmoid_stage(kit, tmp_path), ALONE).model
    assert model.logit_scale.item() == pytest.approx(math.log(10)) and model.logit_bias is not None
    assert model.logit_bias.item() == -10.0
    settings = sigmoid_stage(kit, tmp_path)
    chosen = replace(settings.model, logit_scale_init=1.0, logit_bias_init=-3.0)
    model = ClipTask(replace(settings, model=chosen), ALONE).model
    assert (
        model.logit_scale.item() == 1.0 and model.logit_bias is not None and model.logit_bias.item() == -3.0
    )
    model = ClipTask(kit.clip_stage(tmp_path), ALONE).model
    assert model.logit_scale.item() == pytest.approx(math.log(1 / 0.07)) and model.logit_bias is None


def test_the_loss_is_the_sigmoid_loss(kit: Kit, tmp_path: Path) -> None:
    task = ClipTask(sigmoid_stage(kit, tmp_path), ALONE)
    _, samples = next(task.batches(0, 0))
    outputs = task.module(task.chunks(samples, 0)[0])
    value, metrics = task.loss(outputs)
    image, text = outputs["image"], outputs["text"]
    want = sigmoid_loss_reference(image, text, outputs["scale"], outputs["bias"]).mean()
    assert torch.allclose(value, want, rtol=1e-5) and metrics["logit_bias"] == -10.0
    value.backward()
    bias = task.model.logit_bias
    assert bias is not None and bias.grad is not None and bias.grad != 0
    assert {"logit_scale", "logit_bias"} <= set(task.groups())


def test_it_learns_the_same_with_the_gradient_cache_and_its_model_loads(kit: Kit, tmp_path: Path) -> None:
    options: dict[str, Any] = {"steps": 12, "lr": 1e-2, "dropout": 0.0}
    runs = []
    for micro_batch in (0, 3):
        out = tmp_path / f"micro{micro_batch}"
        final = train_clip(sigmoid_stage(kit, out, micro_batch=micro_batch, **options))
        runs.append([line for line in curve(out) if "loss" in line])
    for whole, cached in zip(*runs, strict=True):
        assert whole["loss"] == pytest.approx(cached["loss"], rel=1e-3)
        assert whole["logit_bias"] == pytest.approx(cached["logit_bias"], rel=1e-4)
    assert runs[0][-1]["loss"] < runs[0][0]["loss"] and runs[0][-1]["logit_bias"] != -10.0
    model = LLM2CLIP.from_pretrained(final)
    assert model.logit_bias is not None and model.logit_bias.item() == pytest.approx(
        runs[1][-1]["logit_bias"], rel=1e-2
    )
    # a softmax run may have a bias too: it cancels, and stays
    settings = kit.clip_stage(tmp_path / "softmax", steps=2)
    settings = replace(settings, model=replace(settings.model, logit_bias_init=-4.0))
    model = LLM2CLIP.from_pretrained(train_clip(settings))
    assert model.logit_bias is not None and model.logit_bias.item() == -4.0


def test_models_from_before_the_sigmoid_loss_load(kit: Kit, tmp_path: Path) -> None:
    model = ClipTask(kit.clip_stage(tmp_path / "run"), ALONE).model
    model.save_pretrained(tmp_path / "model")
    config = read_json(tmp_path / "model" / "config.json", ConfigError)
    del config["logit_bias_init"]
    write_json(tmp_path / "model" / "config.json", config)
    loaded = LLM2CLIP.from_pretrained(tmp_path / "model")
    assert loaded.logit_bias is None and torch.equal(loaded.logit_scale, model.logit_scale)


def test_settings_that_do_not_fit() -> None:
    with pytest.raises(ConfigError, match="loss.label_smoothing: the sigmoid loss has none, got 0.1"):
        from_tree(TrainSettings, {"loss": {"kind": "sigmoid", "label_smoothing": 0.1}})
    with pytest.raises(ConfigError, match="kind"):
        from_tree(TrainSettings, {"loss": {"kind": "sigmoids"}})
    assert from_tree(TrainSettings, {"model": {"logit_bias_init": -5}}).model == replace(
        ModelSettings(), logit_bias_init=-5.0
    )
