"""Both stages with tiny models: exact resume with dropout and workers, learning, and bad input at the start."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from llm2clip.data.images import normalize_pixels
from llm2clip.data.sample import Sample
from llm2clip.data.sources import open_source
from llm2clip.data.store import EmbeddingStore
from llm2clip.embed import embed
from llm2clip.errors import BadSampleError, CheckpointError, ConfigError, DataError, StoreError
from llm2clip.models.caption_encoder import CaptionEncoder
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.settings import CaptionSettings, EmbedSettings, LLMSettings
from llm2clip.training.clip_reader import draw_captions
from llm2clip.training.clip_task import ClipTask
from llm2clip.training.llm_task import LLMTask
from llm2clip.training.loop import train
from llm2clip.training.run import finetune_llm, train_clip
from tests.data_files import write_tar
from tests.training_kit import (
    ALONE,
    Interrupted,
    Kit,
    assert_same_run,
    curve,
    make_kit,
    picture,
    records,
    write_set,
)


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Kit:
    return make_kit(tmp_path_factory.mktemp("kit"))


def interrupt(task: Any, step: int) -> Any:
    """Let a task raise inside step `step` of this process."""
    loss, count = task.loss, iter(range(10**6))

    def raise_there(outputs: Any) -> Any:
        if next(count) == step:
            raise Interrupted
        return loss(outputs)

    task.loss = raise_there
    return task


def task_of(settings: Any) -> Any:
    return LLMTask(settings, ALONE) if hasattr(settings, "llm") else ClipTask(settings, ALONE)


def run_whole(settings: Any) -> Path:
    return finetune_llm(settings) if hasattr(settings, "llm") else train_clip(settings)


@pytest.mark.parametrize("micro_batch", [0, 3])
@pytest.mark.parametrize("stage", [Kit.llm_stage, Kit.clip_stage])
def test_resume_equals_an_undisturbed_run(
    kit: Kit, tmp_path: Path, stage: Callable[..., Any], micro_batch: int
) -> None:
    # 6 steps of 8 cross the end of the first epoch of 40
    run_whole(stage(kit, tmp_path / "whole", micro_batch=micro_batch))
    for step in (3, 2):
        settings = stage(kit, tmp_path / "cut", micro_batch=micro_batch)
        with pytest.raises(Interrupted):
            train(interrupt(task_of(settings), step), settings.run, settings.optim, ALONE)
    run_whole(stage(kit, tmp_path / "cut", micro_batch=micro_batch))
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    assert [line["step"] for line in curve(tmp_path / "cut") if "loss" in line] == [1, 2, 3, 4, 5, 6]
    names = [p.name for p in (tmp_path / "cut" / "result").iterdir() if p.suffix == ".safetensors"]
    assert len(names) == 1
    for name in names:
        one, other = (load_file(tmp_path / run / "result" / name) for run in ("whole", "cut"))
        assert one and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("stage", [Kit.llm_stage, Kit.clip_stage])
def test_resume_with_workers_equals_a_run_without(
    kit: Kit, tmp_path: Path, stage: Callable[..., Any]
) -> None:
    run_whole(stage(kit, tmp_path / "whole", steps=4, workers=0))
    settings = stage(kit, tmp_path / "cut", steps=4, workers=2)
    with pytest.raises(Interrupted):
        train(interrupt(task_of(settings), 3), settings.run, settings.optim, ALONE)
    run_whole(settings)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize("stage", [Kit.llm_stage, Kit.clip_stage])
def test_the_gradient_cache_trains_the_same(kit: Kit, tmp_path: Path, stage: Callable[..., Any]) -> None:
    for size in (0, 3):
        run_whole(stage(kit, tmp_path / f"micro{size}", micro_batch=size, dropout=0.0))
    for one, other in zip(curve(tmp_path / "micro0"), curve(tmp_path / "micro3"), strict=True):
        assert one == pytest.approx(other, rel=2e-4, abs=2e-5)


def test_the_llm_stage_learns_and_its_adapter_loads(kit: Kit, tmp_path: Path) -> None:
    settings = kit.llm_stage(tmp_path, steps=40, batch_size=20, lr=2e-2, dropout=0.0, save_every=50)
    result = finetune_llm(settings)
    losses = [line["loss"] for line in curve(tmp_path) if "loss" in line]
    assert losses[-1] < 0.3 * losses[0]
    source = open_source(settings.data.train)
    samples = [source.captions_of(i).captions for i in range(len(source))]
    found = [(sample["name"][0], sample["description"][0]) for sample in samples]
    tuned = CaptionEncoder.from_pretrained(kit.root / "llm", adapter=result)
    base = CaptionEncoder.from_pretrained(kit.root / "llm")
    assert accuracy(tuned, found) > accuracy(base, found) + 0.2


def accuracy(encoder: CaptionEncoder, pairs: list[tuple[str, str]]) -> float:
    short, long = (encoder.encode([pair[i] for pair in pairs], normalize=True) for i in range(2))
    return ((short @ long.T).argmax(1) == torch.arange(len(pairs))).double().mean().item()


def test_the_clip_stage_learns_and_its_model_loads(kit: Kit, tmp_path: Path) -> None:
    options = {"val": [], "captions": kit.data()["captions"] | {"probabilities": {"short": 1}}}
    settings = kit.clip_stage(
        tmp_path, steps=60, batch_size=20, lr=2e-2, dropout=0.0, embed_dim=16, save_every=100, data=options
    )
    model = LLM2CLIP.from_pretrained(train_clip(settings))
    lines = curve(tmp_path)
    assert lines[-1]["loss"] < 0.4 * lines[0]["loss"]
    assert lines[-1]["positive_similarity"] > lines[0]["positive_similarity"] + 0.2
    store = EmbeddingStore.open(kit.root / "store")
    assert model.fingerprint == store.fingerprint
    task = ClipTask(settings, ALONE)
    _, samples = next(task.batches(0, 0))
    (chunk,) = task.chunks(samples, 0)
    fresh = ClipTask(settings, ALONE).model.eval()
    hits = []
    for candidate in (fresh, model):
        with torch.no_grad():
            vision = candidate.vision_model
            out = candidate(normalize_pixels(chunk.pixels, vision.mean, vision.std), chunk.embeddings)
        best = (out["image_features"] @ out["text_features"].T).argmax(1)
        hits.append((best == torch.arange(len(best))).double().mean().item())
    assert hits[1] > hits[0] + 0.3


def test_held_out_metrics_are_logged(kit: Kit, tmp_path: Path) -> None:
    train_clip(kit.clip_stage(tmp_path, eval_every=4))
    steps = [line["step"] for line in curve(tmp_path) if "val/short/t2i_r10" in line]
    assert steps == [4, 6]
    assert json.loads((tmp_path / "summary.json").read_text())["val/short/chance_r10"] == pytest.approx(
        10 / 12
    )


@pytest.mark.parametrize("stage", [Kit.llm_stage, Kit.clip_stage])
def test_bf16_runs(kit: Kit, tmp_path: Path, stage: Callable[..., Any]) -> None:
    run_whole(stage(kit, tmp_path / "wide", steps=2, dropout=0.0))
    run_whole(stage(kit, tmp_path / "half", steps=2, dropout=0.0, precision="bf16", micro_batch=3))
    wide, half = curve(tmp_path / "wide")[0], curve(tmp_path / "half")[0]
    assert wide["loss"] != half["loss"] and half["loss"] == pytest.approx(wide["loss"], rel=0.05)


def test_hard_negative_loss_runs(kit: Kit, tmp_path: Path) -> None:
    settings = kit.llm_stage(tmp_path, steps=2)
    finetune_llm(replace(settings, loss=replace(settings.loss, kind="hard_negative")))
    assert curve(tmp_path)[0]["loss"] > 0


def test_a_finished_stage_loads_nothing(kit: Kit, tmp_path: Path) -> None:
    settings = kit.clip_stage(tmp_path / "run", steps=2)
    result = train_clip(settings)
    gone = replace(
        settings, store=str(tmp_path / "no store"), data=replace(settings.data, train=("none.tar",))
    )
    assert train_clip(gone) == result
    llm = kit.llm_stage(tmp_path / "llm-run", steps=1)
    assert finetune_llm(llm) == finetune_llm(replace(llm, llm=LLMSettings(path="nowhere")))


@pytest.mark.parametrize("stage", [Kit.llm_stage, Kit.clip_stage])
def test_missing_settings_are_named(kit: Kit, tmp_path: Path, stage: Callable[..., Any]) -> None:
    settings = stage(kit, tmp_path)
    with pytest.raises(ConfigError, match=r"data\.train"):
        run_whole(replace(settings, data=replace(settings.data, train=())))
    with pytest.raises(ConfigError, match=r"run\.out"):
        run_whole(replace(settings, run=replace(settings.run, out="")))
    with pytest.raises(ConfigError, match=r"run\.batch_size: .* 41 .* 40 "):
        run_whole(replace(settings, run=replace(settings.run, batch_size=41)))
    with pytest.raises(DataError, match=r"missing"):
        run_whole(replace(settings, data=replace(settings.data, train=(str(tmp_path / "missing.tar"),))))


def test_a_store_that_does_not_fit_is_refused_at_the_start(kit: Kit, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="store: expected"):
        train_clip(kit.clip_stage(tmp_path / "run", store=""))
    with pytest.raises(StoreError, match="nowhere"):
        train_clip(kit.clip_stage(tmp_path / "run", store=str(tmp_path / "nowhere")))
    other = write_set(tmp_path / "other.tar", records(10, 500), 500)
    with pytest.raises(StoreError, match="20 .*captions|captions.*20"):
        train_clip(kit.clip_stage(tmp_path / "run", data={"train": [str(other)]}))
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_another_encoder_or_width_is_refused(kit: Kit, tmp_path: Path) -> None:
    settings = kit.clip_stage(tmp_path / "run")
    with pytest.raises(Interrupted):
        train(interrupt(ClipTask(settings, ALONE), 3), settings.run, settings.optim, ALONE)
    with pytest.raises(
        CheckpointError, match=r"visual_projection\.weight: checkpoint \(8, 16\), model \(6, 16\)"
    ):
        train_clip(kit.clip_stage(tmp_path / "run", embed_dim=6))
    data = settings.data
    llm = LLMSettings(path=str(kit.root / "llm"), prompt="another encoder: ")
    other = embed(EmbedSettings(data=data, llm=llm, out=str(tmp_path / "store"), device="cpu"))
    assert other.complete
    with pytest.raises(StoreError, match="prompt"):
        train_clip(kit.clip_stage(tmp_path / "run", store=str(tmp_path / "store")))


def test_samples_that_cannot_be_used_are_skipped_or_stop_the_run(kit: Kit, tmp_path: Path) -> None:
    good = records(40)
    texts = [{k: v for k, v in record.items()} for record in good]
    members = []
    for number, record in enumerate(texts):
        if number == 5:
            members.append((f"{number:04d}.png", b"this is text"))
        elif number != 6:  # the image is missing
            members.append((f"{number:04d}.png", picture(number)))
        fields = {"group": "x", "other": "no role"} if number == 7 else record
        members.append((f"{number:04d}.json", json.dumps(fields).encode()))
    path = str(write_tar(tmp_path / "bad.tar", members))
    base = {"train": [path]}
    train_clip(kit.clip_stage(tmp_path / "run", data=base | {"max_bad_share": 0.2}, steps=12))
    assert [line["step"] for line in curve(tmp_path / "run") if "loss" in line] == list(range(1, 13))
    with pytest.raises(DataError, match=r"cannot be used .*0005.*max_bad_share|0006|0007"):
        train_clip(kit.clip_stage(tmp_path / "strict", data=base | {"max_bad_share": 0.01}, steps=12))


def test_data_without_captions_names_the_fields(kit: Kit, tmp_path: Path) -> None:
    captions = {"short": "titel", "long": ["beschreibung"]}
    with pytest.raises(DataError, match=r"titel, beschreibung.*description, es\.name, name"):
        train_clip(kit.clip_stage(tmp_path, data={"captions": captions}))
    settings = kit.llm_stage(tmp_path)
    wrong = replace(settings.data.captions, short=("titel",))
    with pytest.raises(DataError, match=r"titel.*description \(40\), es\.name \(40\), name \(40\)"):
        finetune_llm(replace(settings, data=replace(settings.data, captions=wrong)))


@pytest.mark.parametrize("chances", [{"shrot": 1.0}, {"short": -1.0, "long": 2.0}, {"short": 0.0}])
def test_wrong_probabilities_are_refused(kit: Kit, tmp_path: Path, chances: dict[str, float]) -> None:
    captions = kit.data()["captions"] | {"probabilities": chances}
    with pytest.raises(ConfigError, match=r"data\.captions\.probabilities"):
        train_clip(kit.clip_stage(tmp_path, data={"captions": captions}))


def sample(**captions: str) -> Sample:
    return Sample("key", {name: (text,) for name, text in captions.items()}, None, "group")


@pytest.mark.parametrize(
    ("chances", "share"), [({}, 0.5), ({"short": 1.0, "long": 3.0}, 0.25), ({"long": 2.0}, 0.0)]
)
def test_captions_are_picked_with_their_probability(chances: dict[str, float], share: float) -> None:
    captions = CaptionSettings(short=("s",), long=("l",), probabilities=chances)
    rng = np.random.default_rng(0)
    picked = [draw_captions(sample(s="short", l="long"), captions, rng)[0] for _ in range(4000)]
    assert picked.count("short") / 4000 == pytest.approx(share, abs=0.03)
    # the share of a role without text goes to the other
    if chances.get("short", 1.0) and share:
        assert draw_captions(sample(s="short"), captions, rng) == ("short",)
    assert draw_captions(sample(l="long"), captions, rng) == ("long",)
    with pytest.raises(BadSampleError, match="no caption in (s, )?l; it has x"):
        draw_captions(sample(x="other"), captions, rng)


def test_the_logit_scale_stays_in_its_bounds(kit: Kit, tmp_path: Path) -> None:
    task = ClipTask(kit.clip_stage(tmp_path), ALONE)
    for value, bounded in ((9.0, task.settings.model.logit_scale_max), (-1.0, 0.0), (1.5, 1.5)):
        with torch.no_grad():
            task.model.logit_scale.fill_(value)
        task.after_step()
        assert task.model.logit_scale.item() == pytest.approx(bounded)


def test_a_group_appears_once_in_a_batch(kit: Kit, tmp_path: Path) -> None:
    twins = [record | {"group": f"pair{number // 2}"} for number, record in enumerate(records(8))]
    path = str(write_set(tmp_path / "twins.tar", twins))
    settings = kit.clip_stage(tmp_path / "run", data={"train": [path]}, loss={"duplicates": "drop"})
    task = ClipTask(settings, ALONE)
    _, samples = next(task.batches(0, 0))
    assert len(samples) == 8 and sum(len(chunk) for chunk in task.chunks(samples, 3)) == 4
    everything = replace(settings, loss=replace(settings.loss, duplicates="mask"))
    assert sum(len(chunk) for chunk in ClipTask(everything, ALONE).chunks(samples, 3)) == 8
