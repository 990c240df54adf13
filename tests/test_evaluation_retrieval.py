"""`evaluate retrieval` end to end, against recall computed by hand."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from llm2clip.cli import main
from llm2clip.data.images import ImageTransform, decode_image
from llm2clip.embed import embed
from llm2clip.errors import ConfigError, DataError, ModelError, StoreError
from llm2clip.evaluation import benchmark_retrieval, evaluate
from llm2clip.evaluation.benchmark_retrieval import evaluate_retrieval
from llm2clip.evaluation.datasets import Request, open_dataset
from llm2clip.evaluation.ranking import pair_up
from llm2clip.export.card import result_metrics
from llm2clip.models.caption_encoder import CaptionEncoder
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.settings import (
    CaptionSettings,
    DataSettings,
    EmbedSettings,
    EvaluateSettings,
    LLMSettings,
    ModelSettings,
    RetrievalSettings,
)
from llm2clip.training.world import World
from tests.benchmark_files import WRITERS, write_json
from tests.data_files import image_bytes, members_of, write_tar
from tests.evaluation_kit import Kit, build_kit

sys.path.insert(0, str(Path(__file__).parent))
from gloo import run_on_ranks  # noqa: E402


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Kit:
    return build_kit(tmp_path_factory.mktemp("kit"))


@pytest.fixture
def settings(kit: Kit, tmp_path: Path) -> RetrievalSettings:
    """Flickr30k with 24 images, two models, captions by the LLM."""
    WRITERS["flickr30k"](tmp_path / "flickr30k", 32)
    return RetrievalSettings(
        models={"first": str(kit.first), "second": str(kit.second)}, llm=LLMSettings(path=str(kit.llm)),
        datasets={"flickr30k": str(tmp_path / "flickr30k")}, out=str(tmp_path / "out"), device="cpu",
        resamples=200, samples=2,
    )  # fmt: skip


def found(results: dict[str, Any], model: str, direction: str, dataset: str = "flickr30k") -> Any:
    """Scores of one row."""
    wanted = {"model": model, "direction": direction, "dataset": dataset}
    (row,) = [r for r in results["retrieval"] if all(r[name] == value for name, value in wanted.items())]
    return row["scores"]


def by_hand(kit: Kit, folder: Path, root: Path, *, center: bool = False) -> dict[str, list[float]]:
    """R@1, 5, 10 of both directions: the published protocol, from the model's own methods and a matrix."""
    data = open_dataset("flickr30k", Request(root))
    model = LLM2CLIP.from_pretrained(folder / "result")
    transform = ImageTransform(8, model.vision_model.mean, model.vision_model.std)
    pixels = [transform(decode_image(data.images.read(row))) for row in range(len(data.images))]
    captions = data.captions[0]
    with torch.no_grad():
        images = model.get_image_features(torch.stack(pixels)).double()
        texts = model.get_text_features(
            CaptionEncoder.from_pretrained(kit.llm).encode(captions.texts)
        ).double()
    sides = [torch.nn.functional.normalize(side, dim=1) for side in (texts, images)]
    if center:
        sides = [torch.nn.functional.normalize(side - side.mean(0), dim=1) for side in sides]
    similar = (sides[0] @ sides[1].T).numpy()
    own = similar[np.arange(len(texts)), captions.image]
    of_texts = 1 + (similar > own[:, None]).sum(1)
    of_images = []
    for row in range(len(images)):
        mine = captions.image == row
        of_images.append(1 + (similar[~mine, row] > similar[mine, row].max()).sum())
    return {
        "text → image": [float((of_texts <= k).mean()) for k in (1, 5, 10)],
        "image → text": [float((np.array(of_images) <= k).mean()) for k in (1, 5, 10)],
    }


def test_recall_is_that_of_the_published_protocol(
    kit: Kit, settings: RetrievalSettings, tmp_path: Path
) -> None:
    results = evaluate_retrieval(settings)
    for label, folder in (("first", kit.first), ("second", kit.second)):
        wanted = by_hand(kit, folder, tmp_path / "flickr30k")
        for direction, recall in wanted.items():
            scores = found(results, label, direction)
            assert list(scores["recall"].values()) == pytest.approx(recall)
    sizes = found(results, "first", "text → image")
    assert (sizes["queries"], sizes["gallery"]) == (120, 24)
    assert sizes["chance"]["1"] == pytest.approx(1 / 24)
    # five of 120 captions are right: less than five draws, since one is enough
    assert found(results, "first", "image → text")["chance"]["1"] == pytest.approx(5 / 120)
    assert results["setup"]["models"]["first"]["captions"] == "the LLM"
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == json.loads(json.dumps(results))
    # what a model card takes from it
    for_card = result_metrics(tmp_path / "out" / "results.json")
    second = by_hand(kit, kit.second, tmp_path / "flickr30k")
    assert for_card["Flickr30k text → image R@1"] == pytest.approx(second["text → image"][0])
    assert len(for_card) == 6


def test_captions_and_images_less_their_means(kit: Kit, settings: RetrievalSettings, tmp_path: Path) -> None:
    centred = replace(settings, center=True)
    results = evaluate_retrieval(centred)
    wanted = by_hand(kit, kit.first, tmp_path / "flickr30k", center=True)
    assert wanted != by_hand(kit, kit.first, tmp_path / "flickr30k")
    for direction, recall in wanted.items():
        assert list(found(results, "first", direction)["recall"].values()) == pytest.approx(recall)
    assert {row["title"] for row in results["retrieval"]} == {"Flickr30k, centred"}
    assert "Flickr30k, centred" in (tmp_path / "out" / "report.html").read_text()


def test_models_are_compared_on_the_same_queries(settings: RetrievalSettings) -> None:
    results = evaluate_retrieval(settings)
    for row in results["comparisons"]:
        scores = [found(results, name, row["direction"])["recall"]["1"] for name in ("second", "first")]
        assert (row["model"], row["baseline"], row["measure"]) == ("second", "first", "R@1")
        assert row["difference"] == pytest.approx(scores[0] - scores[1])
        low, high = row["interval"]
        assert low <= row["difference"] <= high and row["certain"] == (low > 0 or high < 0)
    other = evaluate_retrieval(replace(settings, baseline="second"))["comparisons"]
    assert [row["difference"] for row in other] == [-row["difference"] for row in results["comparisons"]]
    alone = evaluate_retrieval(replace(settings, models={"first": settings.models["first"]}))
    assert alone["comparisons"] == []


def test_features_are_computed_once(settings: RetrievalSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    first = evaluate_retrieval(settings)

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("computed again")

    monkeypatch.setattr(CaptionEncoder, "encode", never)
    monkeypatch.setattr(LLM2CLIP, "get_text_features", never)
    monkeypatch.setattr("llm2clip.evaluation.encoders.ours.LLM2CLIPEncoder.encode_images", never)
    again = evaluate_retrieval(replace(settings, ks=(1, 2)))
    assert (
        found(again, "first", "text → image")["recall"]["1"]
        == found(first, "first", "text → image")["recall"]["1"]
    )
    assert list(found(again, "first", "text → image")["recall"]) == ["1", "2"]


def test_the_embeddings_of_the_llm_serve_both_models(
    settings: RetrievalSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    encode = CaptionEncoder.encode
    monkeypatch.setattr(
        CaptionEncoder,
        "encode",
        lambda self, texts, **rest: calls.append(len(texts)) or encode(self, texts, **rest),
    )
    evaluate_retrieval(settings)
    assert calls == [120]


def test_captions_from_a_store_give_the_same(kit: Kit, settings: RetrievalSettings, tmp_path: Path) -> None:
    online = evaluate_retrieval(settings)
    file, store = tmp_path / "captions.jsonl", tmp_path / "store"
    stored = replace(settings, llm=LLMSettings(), stores=(str(store),), out=str(tmp_path / "stored"))
    assert evaluate_retrieval(replace(stored, captions_out=str(file)))["captions"] == 120
    job = EmbedSettings(
        data=DataSettings(val=(str(file),)), llm=LLMSettings(path=str(kit.llm)), out=str(store), device="cpu",
        dtype="fp32",
    )  # fmt: skip
    embed(job)
    results = evaluate_retrieval(stored)
    for mine, theirs in zip(results["retrieval"], online["retrieval"], strict=True):
        assert mine["scores"]["recall"] == pytest.approx(theirs["scores"]["recall"])
    # a store of other captions
    WRITERS["docci"](tmp_path / "docci", 9)
    both = {**stored.datasets, "docci": str(tmp_path / "docci")}
    with pytest.raises(
        StoreError, match=r"(?s)holds none of the 6 captions of DOCCI.*First missing:.*test_00000"
    ):
        evaluate_retrieval(replace(stored, datasets=both))
    # and of another encoder
    embed(replace(job, llm=replace(job.llm, prompt="p"), out=str(tmp_path / "other")))
    with pytest.raises(StoreError, match="another encoder.*\n  prompt: stored 'p', expected ''"):
        evaluate_retrieval(replace(stored, stores=(str(tmp_path / "other"),)))
    # each model finds its own among several
    assert evaluate_retrieval(replace(stored, stores=(str(tmp_path / "other"), str(store))))["retrieval"]


def test_a_published_model_takes_the_store_it_is_given(
    kit: Kit, settings: RetrievalSettings, tmp_path: Path
) -> None:
    model = LLM2CLIP.from_pretrained(kit.first / "result")
    model.fingerprint = None
    model.save_pretrained(tmp_path / "published")
    published = replace(settings, models={"published": str(tmp_path / "published")})
    assert evaluate_retrieval(published)["retrieval"] != []
    wide = LLM2CLIP(ModelSettings(embed_dim=4, adapter_depth=1), 48, vision=model.vision_model)
    wide.save_pretrained(tmp_path / "wide")
    with pytest.raises(
        StoreError, match="wide takes LLM embeddings of dimension 48, but those of the LLM have 32"
    ):
        evaluate_retrieval(replace(settings, models={"wide": str(tmp_path / "wide")}))
    with pytest.raises(StoreError, match="set stores or llm.path"):
        evaluate_retrieval(replace(published, llm=LLMSettings()))
    with pytest.raises(
        ModelError, match="(?s)first was trained on embeddings of another.*prompt: stored 'p'"
    ):
        evaluate_retrieval(replace(settings, llm=replace(settings.llm, prompt="p")))


def test_missing_images_are_named_before_anything_is_computed(
    settings: RetrievalSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "flickr30k" / "flickr30k-images"
    (folder / "1007129817.jpg").unlink()
    (folder / "1007129818.jpg").write_bytes(b"this is no image")
    monkeypatch.setattr(benchmark_retrieval, "EncoderOpener", None)  # not even a model is loaded
    with pytest.raises(
        DataError, match=r"(?s)1 of the 24 images of Flickr30k.*1007129817\.jpg does not exist"
    ):
        evaluate_retrieval(settings)
    monkeypatch.undo()
    results = evaluate_retrieval(replace(settings, max_bad_share=0.1))
    scores = found(results, "second", "text → image")
    assert (scores["queries"], scores["gallery"]) == (110, 22)
    lost = results["datasets"]["flickr30k"]["unusable images"]
    assert len(lost) == 2 and "1007129817" in lost[0] and "1007129818" in lost[1]
    assert "1007129818" in (tmp_path / "out" / "report.html").read_text()
    (folder / "1007129817.jpg").write_bytes(image_bytes((9, 9, 9)))
    with pytest.raises(DataError, match=r"(?s)1 of the 24 .*1007129818.*is not JPEG"):
        evaluate_retrieval(settings)


def odd_images() -> list[bytes]:
    """CMYK, grey with transparency, 16 bits, animated, palette with transparency, 1 bit."""
    grey = Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000)
    frames = [Image.new("RGB", (9, 9), color) for color in ((255, 0, 0), (0, 0, 255))]
    kinds: list[tuple[Image.Image, str, dict[str, Any]]] = [
        (Image.new("CMYK", (9, 7), (10, 200, 30, 0)), "JPEG", {}),
        (Image.new("LA", (9, 7), (90, 100)), "PNG", {}),
        (grey, "PNG", {}),
        (frames[0], "GIF", {"save_all": True, "append_images": frames[1:]}),
        (frames[0], "WEBP", {"save_all": True, "append_images": frames[1:], "lossless": True}),
        (Image.new("P", (9, 7), 3), "PNG", {"transparency": 3}),
        (Image.new("1", (9, 7), 1), "PNG", {}),
        (Image.new("RGB", (400, 1), (1, 2, 3)), "PNG", {}),
    ]
    data = []
    for image, kind, options in kinds:
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        data.append(buffer.getvalue())
    return data


def test_images_of_every_mode(kit: Kit, tmp_path: Path) -> None:
    root = tmp_path / "urban1k"
    odd = odd_images()
    WRITERS["urban1k"](root, len(odd))
    for number, data in enumerate(odd, 1):
        (root / "image" / f"{number}.jpg").write_bytes(data)
    models = {"ours": str(kit.first), "clip": f"transformers:{kit.clip}"}
    results = evaluate_retrieval(
        RetrievalSettings(
            models=models, llm=LLMSettings(path=str(kit.llm)), datasets={"urban1k": str(root)},
            out=str(tmp_path / "out"), device="cpu",
        )
    )  # fmt: skip
    for label in models:
        assert found(results, label, "image → text", "urban1k")["gallery"] == len(odd)


def test_captions_with_equal_text_match_in_own_data_alone(tmp_path: Path) -> None:
    for number, (name, count) in enumerate((("urban1k", 4), ("openstax", 4))):
        WRITERS[name](tmp_path / name, count)
        data = open_dataset(name, Request(tmp_path / name))
        captions = data.captions[0]
        captions.texts[2] = captions.texts[0]
        pairing = pair_up(captions, np.ones(4, bool), equal_match=data.equal_match)
        right = pairing.text_groups[:, None] == pairing.image_groups
        assert right.sum() == (4 if number == 0 else 6)
        assert right[0, 2] == right[2, 0] == (number == 1)


def test_images_without_captions_of_a_kind_are_not_in_its_gallery(kit: Kit, tmp_path: Path) -> None:
    WRITERS["openstax"](tmp_path / "openstax", 12)
    results = evaluate_retrieval(
        RetrievalSettings(
            models={"first": str(kit.first)}, llm=LLMSettings(path=str(kit.llm)), out=str(tmp_path / "out"),
            datasets={"openstax": str(tmp_path / "openstax")}, device="cpu", limit=10,
        )
    )  # fmt: skip
    sizes = {row["captions"]: row["scores"]["gallery"] for row in results["retrieval"]}
    assert sizes == {"short": 10, "long": 10, "pl": 5}


def test_own_data_beside_a_benchmark(kit: Kit, settings: RetrievalSettings, tmp_path: Path) -> None:
    members = members_of([f"k{number}" for number in range(9)])
    write_tar(tmp_path / "val.tar", members)
    own = DataSettings(val=(str(tmp_path / "val.tar"),))
    results = evaluate_retrieval(replace(settings, data=own))
    assert {(row["dataset"], row["captions"]) for row in results["retrieval"]} == {
        ("flickr30k", "captions"), ("data", "short"), ("data", "long")
    }  # fmt: skip


def test_distractors_fill_the_gallery_and_ask_nothing(settings: RetrievalSettings, tmp_path: Path) -> None:
    alone = evaluate_retrieval(settings)
    members = members_of([f"x{number}" for number in range(40)])
    write_tar(tmp_path / "more.tar", [*members, ("bad.png", b"no image"), ("bad.txt", b"a caption")])
    full = replace(settings, distractors=(str(tmp_path / "more.tar"),), out=str(tmp_path / "full"))
    with pytest.raises(DataError, match="1 of the 41 images of distractors cannot be used"):
        evaluate_retrieval(full)
    results = evaluate_retrieval(replace(full, max_bad_share=0.05, samples=20))
    for label in settings.models:
        more, less = (found(r, label, "text → image") for r in (results, alone))
        assert (more["queries"], more["gallery"]) == (120, 24 + 40)
        assert more["chance"]["1"] == pytest.approx(1 / 64) and more["median_rank"] > less["median_rank"]
        assert more["recall"]["5"] <= less["recall"]["5"]
        # images ask among the captions, which are the same
        assert found(results, label, "image → text") == found(alone, label, "image → text")
    assert results["datasets"]["distractors"]["images"] == 41
    assert "of 64" in (tmp_path / "full" / "report.html").read_text()


def test_own_data_scores_as_in_plain_evaluate(kit: Kit, tmp_path: Path) -> None:
    """The same model on the same captions by the other evaluation, equal captions and translations included."""
    members = []
    for number in range(30):
        texts = {
            "caption": f"short {number // 2}",
            "alt": f"a longer text about {number}",
            "es": {"caption": f"{number}"},
        }
        members += [
            (f"{number}.png", image_bytes((8 * number, 250 - 7 * number, 9))),
            (f"{number}.json", json.dumps(texts).encode()),
        ]
    write_tar(tmp_path / "val.tar", members)
    captions = CaptionSettings(translations={"es": "es.caption"})
    data = DataSettings(val=(str(tmp_path / "val.tar"),), captions=captions)
    llm = LLMSettings(path=str(kit.llm))
    plain = evaluate(
        EvaluateSettings(data=data, model=str(kit.first), llm=llm, out=str(tmp_path / "plain"), device="cpu")
    )
    ours = evaluate_retrieval(
        RetrievalSettings(
            data=data, models={"it": str(kit.first)}, llm=llm, out=str(tmp_path / "ours"), device="cpu"
        )
    )
    found = {(row["captions"], row["direction"]): row["scores"] for row in ours["retrieval"]}
    assert len(plain["retrieval"]) == len(found) == 6
    for row in plain["retrieval"]:
        mine = found[row["queries"], row["direction"]]
        for measure in ("recall", "chance", "mrr", "chance_mrr", "median_rank", "queries", "gallery"):
            assert mine[measure] == pytest.approx(row["scores"][measure])


def check_ranks(rank: int, world: int, given: RetrievalSettings, wanted: dict[str, Any]) -> None:
    def start(*_: Any) -> Any:
        import contextlib

        return contextlib.nullcontext(World(rank, world, torch.device("cpu")))

    benchmark_retrieval.start_world = start  # the process group is there already
    results = evaluate_retrieval(given)
    for name in ("retrieval", "comparisons"):
        assert json.loads(json.dumps(results[name])) == wanted[name]


@pytest.mark.dist
def test_ranks_share_the_work_and_agree(settings: RetrievalSettings, tmp_path: Path) -> None:
    wanted = evaluate_retrieval(replace(settings, out=str(tmp_path / "alone")))
    run_on_ranks(2, check_ranks, settings, json.loads(json.dumps(wanted)))
    assert json.loads((tmp_path / "out" / "results.json").read_text())["setup"]["ranks"] == 2


def test_the_command_prints_tables_and_writes_all_files(
    kit: Kit, settings: RetrievalSettings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    WRITERS["xm3600"](tmp_path / "xm3600", 6)
    records = [json.loads(line) for line in (tmp_path / "xm3600" / "captions.jsonl").read_text().splitlines()]
    for record in records:  # more than four languages get a table of their own
        record |= {language: record["en"] for language in ("fr", "it", "ja")}
    (tmp_path / "xm3600" / "captions.jsonl").write_text("\n".join(map(json.dumps, records)))
    status = main(
        ["evaluate", "retrieval", f"models.first={kit.first}", f"models.b&w={kit.second}", f"llm.path={kit.llm}",
         f"datasets.flickr30k={tmp_path / 'flickr30k'}", f"datasets.xm3600={tmp_path / 'xm3600'}",
         f"out={tmp_path / 'out'}", "device=cpu"]
    )  # fmt: skip
    assert status == 0
    shown = capsys.readouterr().out
    for text in ("XM3600 by language", "XM3600, mean of languages", "Difference from first", "chance", "quz"):
        assert text in shown
    markdown = (tmp_path / "out" / "tables.md").read_text()
    assert "| model | Flickr30k I→T | Flickr30k T→I | XM3600, mean of languages I→T |" in markdown
    latex = (tmp_path / "out" / "tables.tex").read_text()
    assert latex.count(r"\begin{tabular}") == latex.count(r"\end{tabular}") == 5
    assert r"b\&w" in latex and r"\multicolumn{2}{c}{Flickr30k}" in latex and "→" not in latex
    for block in latex.split(r"\begin{tabular}{")[1:]:  # every line has as many cells as the table columns
        columns = len(block.partition("}")[0])
        for line in block.partition(r"\bottomrule")[0].splitlines():
            if line.endswith(r"\\") and "multicolumn" not in line:
                assert line.replace(r"\&", "").count("&") == columns - 1
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Sample queries" in page and 'class="right' in page and "<script" not in page
    assert "XM3600, de" in page and "b&amp;w" in page


def test_settings_that_cannot_be(settings: RetrievalSettings, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to retrieve from"):
        evaluate_retrieval(replace(settings, datasets={}))
    with pytest.raises(ConfigError, match="images: coco is not among the datasets"):
        evaluate_retrieval(replace(settings, images={"coco": "x"}))
    with pytest.raises(ConfigError, match="out is empty"):
        evaluate_retrieval(replace(settings, out=""))
    with pytest.raises(ConfigError, match="models is empty"):
        evaluate_retrieval(replace(settings, models={}))
    with pytest.raises(ConfigError, match="baseline: 'third' is none of the models: first, second"):
        replace(settings, baseline="third")
    with pytest.raises(ConfigError, match="ks: expected ranks"):
        replace(settings, ks=(0,))
    with pytest.raises(ConfigError, match="captions_per_image: expected at least 1"):
        replace(settings, captions_per_image=0)
    write_json(tmp_path / "flickr30k" / "dataset_flickr30k.json", {"pictures": []})
    with pytest.raises(DataError, match="no field 'images'; fields found: pictures"):
        evaluate_retrieval(settings)
