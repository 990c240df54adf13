"""`evaluate zero-shot` end to end, against accuracy computed by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from llm2clip.cli import main
from llm2clip.data.images import ImageTransform, decode_image
from llm2clip.embed import embed
from llm2clip.errors import DataError, StoreError
from llm2clip.evaluation.benchmark_zero_shot import evaluate_zero_shot
from llm2clip.evaluation.datasets.labelled import open_labelled
from llm2clip.evaluation.prompts import prompt_sets
from llm2clip.models.caption_encoder import CaptionEncoder
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.settings import DataSettings, EmbedSettings, LLMSettings, ZeroShotSettings
from tests.benchmark_files import write_image, write_json
from tests.data_files import image_bytes
from tests.evaluation_kit import Kit, build_kit

FOLDERS = ["ant", "bee", "cow", "dog", "eel", "fox", "gnu"]


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Kit:
    return build_kit(tmp_path_factory.mktemp("kit"))


@pytest.fixture
def settings(kit: Kit, tmp_path: Path) -> ZeroShotSettings:
    """49 images of seven classes, unequally many, and CuPL sentences for them."""
    for label, folder in enumerate(FOLDERS):
        for number in range(4 + label):
            write_image(tmp_path / "val" / folder / f"{number}.jpg", 17 * label + number)
    write_json(tmp_path / "cupl.json", {name: [f"A {name}.", f"The {name} is here."] for name in FOLDERS})
    return ZeroShotSettings(
        models={"first": str(kit.first), "second": str(kit.second)}, llm=LLMSettings(path=str(kit.llm)),
        images=str(tmp_path / "val"), cupl=str(tmp_path / "cupl.json"), prompts=("single", "ensemble", "cupl"),
        out=str(tmp_path / "out"), device="cpu", resamples=100,
    )  # fmt: skip


def test_accuracy_is_that_of_the_definition(kit: Kit, settings: ZeroShotSettings) -> None:
    results = evaluate_zero_shot(settings)
    data = open_labelled(settings.images)
    encoder = CaptionEncoder.from_pretrained(kit.llm)
    sets = prompt_sets(settings.prompts, FOLDERS, settings.cupl, "")
    assert [row["prompts"] for row in results["zero_shot"]] == [one.title for one in sets for _ in range(2)]
    for label, folder in (("first", kit.first), ("second", kit.second)):
        model = LLM2CLIP.from_pretrained(folder / "result")
        transform = ImageTransform(8, model.vision_model.mean, model.vision_model.std)
        pixels = torch.stack(
            [transform(decode_image(data.images.read(row))) for row in range(len(data.images))]
        )
        for one in sets:
            classes = []
            with torch.no_grad():
                images = torch.nn.functional.normalize(model.get_image_features(pixels).double(), dim=1)
                for own in one.prompts:
                    features = model.get_text_features(encoder.encode(own)).double()
                    mean = torch.nn.functional.normalize(features, dim=1).mean(0)
                    classes.append(mean / mean.norm())
            similar = (images @ torch.stack(classes).T).numpy()
            place = 1 + (similar > similar[np.arange(len(data.labels)), data.labels][:, None]).sum(1)
            (row,) = [r for r in results["zero_shot"] if (r["model"], r["prompts"]) == (label, one.title)]
            scores = row["scores"]
            assert scores["recall"]["1"] == pytest.approx((place == 1).mean())
            assert scores["recall"]["5"] == pytest.approx((place <= 5).mean())
            per_class = [float((place == 1)[data.labels == number].mean()) for number in range(7)]
            assert scores["per_class"] == pytest.approx(per_class)
            assert scores["mean_per_class"] == pytest.approx(np.mean(per_class))
            assert scores["chance"] == {"1": pytest.approx(1 / 7), "5": pytest.approx(5 / 7)}
            low, high = scores["interval"]["1"]
            assert low <= scores["recall"]["1"] <= high
    assert {row["title"] for row in results["comparisons"]} == {one.title for one in sets}


def test_prompts_from_a_store(kit: Kit, settings: ZeroShotSettings, tmp_path: Path) -> None:
    online = evaluate_zero_shot(settings)
    file, store = tmp_path / "prompts.jsonl", tmp_path / "store"
    stored = replace(settings, llm=LLMSettings(), stores=(str(store),), out=str(tmp_path / "stored"))
    assert evaluate_zero_shot(replace(stored, prompts_out=str(file)))["prompts"] == 7 * 82
    embed(
        EmbedSettings(
            data=DataSettings(val=(str(file),)), llm=LLMSettings(path=str(kit.llm)), out=str(store), device="cpu",
            dtype="fp32",
        )
    )  # fmt: skip
    results = evaluate_zero_shot(stored)
    for mine, theirs in zip(results["zero_shot"], online["zero_shot"], strict=True):
        assert mine["scores"]["recall"] == pytest.approx(theirs["scores"]["recall"])
    with pytest.raises(StoreError, match=r"(?s)holds only 574 of the 581 captions of the prompts.*'ant'"):
        evaluate_zero_shot(replace(stored, prompts=(*settings.prompts, "name")))


def test_equal_names_share_their_images(settings: ZeroShotSettings, tmp_path: Path) -> None:
    """Two classes of one name cannot be told apart: each right answer counts half, as chance has it."""
    write_json(tmp_path / "names.json", dict.fromkeys(FOLDERS, "thing"))
    results = evaluate_zero_shot(replace(settings, classes=str(tmp_path / "names.json"), prompts=("single",)))
    for row in results["zero_shot"]:
        assert row["scores"]["recall"]["1"] == pytest.approx(1 / 7)


def test_bad_images(settings: ZeroShotSettings, tmp_path: Path) -> None:
    (tmp_path / "val" / "cow" / "1.jpg").write_bytes(b"text")
    with pytest.raises(DataError, match=r"1 of the 49 images of val cannot be used"):
        evaluate_zero_shot(settings)
    results = evaluate_zero_shot(replace(settings, max_bad_share=0.05))
    assert results["zero_shot"][0]["scores"]["queries"] == 48
    assert "cow/1.jpg" in results["datasets"]["images"]["unusable images"][0]
    (tmp_path / "val" / "cow" / "1.jpg").write_bytes(image_bytes((1, 2, 3), (14, 10), "JPEG"))
    assert evaluate_zero_shot(settings)["zero_shot"][0]["scores"]["queries"] == 49


def test_the_command_and_its_files(
    kit: Kit, settings: ZeroShotSettings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = main(
        ["evaluate", "zero-shot", f"models.clip=transformers:{kit.clip}", f"models.ours={kit.first}",
         f"llm.path={kit.llm}", f"images={settings.images}", f"out={tmp_path / 'out'}", "device=cpu", "limit=30",
         "worst=3"]
    )  # fmt: skip
    assert status == 0
    shown = capsys.readouterr().out
    for text in (
        "Zero-shot classification",
        "chance",
        "80 prompts",
        "mean per class",
        "Confusions",
        "worst",
        "best",
    ):
        assert text in shown
    page = (tmp_path / "out" / "report.html").read_text()
    assert "ours, 80 prompts thinks of" in page and page.count('class="query"') == 6
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["classes"] == FOLDERS and results["datasets"]["images"]["images"] == 30
    assert r"\textbf" in (tmp_path / "out" / "tables.tex").read_text()
