"""`evaluate caption-retrieval` end to end: every kind of encoder, figures known beforehand."""

from __future__ import annotations

import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from llm2clip.cli import main
from llm2clip.data.store import StoreWriter
from llm2clip.errors import ConfigError, ModelError, StoreError
from llm2clip.evaluation.caption_benchmark import evaluate_captions
from llm2clip.models import CaptionEncoder
from llm2clip.settings import CaptionRetrievalSettings, LLMSettings, LoraSettings
from tests.published_llm import llm2vec_adapter
from tests.test_evaluation_captions import coco, lines
from tests.test_evaluation_sentence_encoder import sentence_directory
from tests.tiny_models import save_tiny, tiny_model

IMAGES = 30
FIRST = [f"picture <{number}> of a thing" for number in range(IMAGES)]
SECOND = [f"thing {number}, seen again" for number in range(IMAGES)]
GERMAN = [f"Bild {number}" for number in range(IMAGES)]


def store(path: Path, embeddings: dict[str, torch.Tensor]) -> str:
    values = torch.stack(list(embeddings.values()))
    with StoreWriter(path, dim=values.shape[1], dtype="fp32", fingerprint={"made": "by hand"}) as out:
        out.add(list(embeddings), values)
        out.finish()
    return str(path)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A COCO file, Multi30k files, STS-B, and stores whose figures are known."""
    root = tmp_path_factory.mktemp("captions")
    coco(root / "coco.json", [[a, b, "unused"] for a, b in zip(FIRST, SECOND, strict=True)] + [["lonely"]])
    lines(root / "test.en", *FIRST)
    lines(root / "test.de", *GERMAN)
    pairs = [[FIRST[n], SECOND[(n * 7) % IMAGES], str(n / 6)] for n in range(IMAGES)]
    (root / "sts.csv").write_text("".join(f'"{a}","{b}",{score}\n' for a, b, score in pairs))
    # the right answer always first; the first half of every vector says nothing
    axes = torch.cat([torch.ones(IMAGES, IMAGES), 3 * torch.eye(IMAGES)], dim=1)
    perfect = {text: axes[row] for own in (FIRST, SECOND, GERMAN) for row, text in enumerate(own)}
    store(root / "perfect", perfect)
    store(root / "constant", {text: torch.ones(8) for text in perfect})
    # similarity falls as the score rises
    angles = {text: torch.tensor([1.0, 0.0]) for text in perfect}
    for n in range(IMAGES):
        angle = torch.tensor(n / IMAGES)
        angles[SECOND[(n * 7) % IMAGES]] = torch.stack([angle.cos(), angle.sin()])
    store(root / "contrary", angles)
    return root


@pytest.fixture(scope="module")
def known(root: Path) -> CaptionRetrievalSettings:
    return CaptionRetrievalSettings(
        sets={"coco": str(root / "coco.json"), "multi30k": str(root / "test.{en,de}")},
        sts={"sts": str(root / "sts.csv")},
        encoders={name: str(root / name) for name in ("constant", "perfect", "contrary")},
        dims=(IMAGES,), dtypes=("int8", "fp8"), out=str(root / "report"), device="cpu", resamples=200,
    )  # fmt: skip


def test_figures_that_are_known(known: CaptionRetrievalSettings, capsys: pytest.CaptureFixture[str]) -> None:
    results = evaluate_captions(known)
    rows = {(r["set"], r["direction"], r["encoder"]): r["scores"] for r in results["caption_retrieval"]}
    assert len(rows) == 2 * 2 * 3
    for (name, _, encoder), scores in rows.items():
        assert scores["gallery"] == scores["queries"] == IMAGES
        assert scores["chance"]["1"] == pytest.approx(1 / IMAGES)
        if encoder == "perfect":
            assert scores["recall"] == {"1": 1.0, "5": 1.0, "10": 1.0} and scores["interval"]["1"] == [
                1.0,
                1.0,
            ]
        if encoder == "constant":
            assert scores["recall"]["5"] == pytest.approx(5 / IMAGES), name  # exactly chance
    geometry = {(r["set"], r["encoder"]): r for r in results["geometry"]}
    assert geometry["coco", "perfect"]["alignment"] == pytest.approx(0, abs=1e-9)
    assert geometry["coco", "constant"]["uniformity"] == pytest.approx(0, abs=1e-5)
    assert geometry["coco", "perfect"]["uniformity"] < -0.5
    similarity = {r["encoder"]: r for r in results["similarity"]}
    assert similarity["contrary"]["spearman"] == pytest.approx(-1)
    assert (
        similarity["contrary"]["interval"] == pytest.approx([-1, -1])
        and similarity["constant"]["spearman"] == 0
    )
    differences = {(r["title"], r["direction"], r["model"]): r for r in results["comparisons"]}
    gain = differences["coco", "first → second", "perfect"]
    assert (
        gain["baseline"] == "constant"
        and gain["difference"] == pytest.approx(1 - 1 / IMAGES)
        and gain["certain"]
    )
    assert differences["sts", "sentence pairs", "contrary"]["difference"] == pytest.approx(-1)
    # the first half of the vectors tells nothing apart; what is stored in a byte still does
    reduced = {(r["encoder"], r["dim"], r["dtype"]): r for r in results["reduced"] if r["set"] == "coco"}
    half = reduced["perfect", IMAGES, "fp32"]["directions"]["first → second"]
    assert half["recall"]["1"] == pytest.approx(1 / IMAGES) and half["difference"] == pytest.approx(
        1 / IMAGES - 1
    )
    for dtype in ("int8", "fp8"):
        assert reduced["perfect", 2 * IMAGES, dtype]["directions"]["second → first"]["recall"]["1"] == 1.0
        assert (
            reduced["perfect", 2 * IMAGES, dtype]["bytes"]
            < reduced["perfect", 2 * IMAGES, "fp32"]["bytes"] / 2
        )
    assert reduced["constant", IMAGES, "fp32"]["left out"] == "the encoder gives 8 values"
    assert results["data"]["coco"]["left out"]["captions: fewer than two captions"]["images"] == 1
    shown = capsys.readouterr()
    assert "coco: 1 of 31 images left out, captions: fewer than two captions" in shown.err
    printed = " ".join(shown.out.split())
    assert "Left out: 1 (captions: fewer than two captions)" in printed and "multi30k, de ↔ en" in printed


class Balanced(HTMLParser):
    """Open tags that never close, and the text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img", "source", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_what_is_written(known: CaptionRetrievalSettings) -> None:
    results = evaluate_captions(known)
    out = Path(known.out)
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(results))
    page = Balanced()
    page.feed((out / "report.html").read_text())
    page.close()
    assert page.open == []
    for heading in ("Results", "Sample queries", "Setup", "Data, licence and attribution"):
        assert heading in page.text
    assert "picture <3> of a thing" in page.text  # shown as text, never as a tag
    markdown = (out / "tables.md").read_text()
    for title in (
        "CRA",
        "Cross-lingual",
        "Sentence similarity",
        "Fewer dimensions",
        "Alignment",
        "Encoders",
        "Difference",
    ):
        assert title in markdown
    assert (out / "tables.tex").read_text().count(r"\begin{table}") == markdown.count("### ")


@pytest.fixture(scope="module")
def models(root: Path) -> CaptionRetrievalSettings:
    """Every kind of encoder on tiny models."""
    llm = save_tiny(root / "llm")
    mntp = llm2vec_adapter(root / "mntp", tiny_model("llama"), seed=3)
    trained = CaptionEncoder.from_pretrained(llm, pooling="mean")
    torch.manual_seed(1)
    trained.add_lora(LoraSettings(rank=2))
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    trained.save_adapter(root / "run" / "result")
    trained.save_pretrained(root / "export")
    sentence_directory(root / "sentence", length=64)
    (root / "plain").mkdir()
    for file in (root / "sentence").glob("*"):
        if file.is_file() and file.name != "modules.json":
            (root / "plain" / file.name).write_bytes(file.read_bytes())
    return CaptionRetrievalSettings(
        sets={"coco": str(root / "coco.json")},
        llm=LLMSettings(path=str(llm), merge=(str(mntp),), adapter=None),
        encoders={"run": str(root / "run"), "export": str(root / "export"), "other llm": str(llm),
                  "sentence": str(root / "sentence"), "plain bert": str(root / "plain")},
        out=str(root / "models"), device="cpu", resamples=50, samples=0,
    )  # fmt: skip


def test_every_kind_of_encoder(models: CaptionRetrievalSettings, root: Path) -> None:
    with pytest.warns(UserWarning, match="weighted_mean"):
        merged = evaluate_captions(replace(models, encoders={}, out=str(root / "a")))
    assert list(merged["setup"]["models"]) == ["base, causal", "base, bidirectional", "merged"]
    results = evaluate_captions(replace(models, llm=replace(models.llm, merge=()), out=str(root / "b")))
    about = results["setup"]["models"]
    assert list(about) == ["base, causal", "base, bidirectional", *models.encoders]
    assert about["base, causal"]["attention"] == "causal" and about["run"]["attention"] == "bidirectional"
    recall = {
        r["encoder"]: r["scores"] for r in results["caption_retrieval"] if r["direction"] == "first → second"
    }
    # the same encoder, loaded in two ways
    assert recall["export"]["recall"] == recall["run"]["recall"]
    assert recall["other llm"] == recall["base, bidirectional"]
    geometry = {r["encoder"]: r["alignment"] for r in results["geometry"]}
    assert geometry["run"] == pytest.approx(geometry["export"], rel=1e-3)
    assert geometry["base, causal"] != pytest.approx(geometry["base, bidirectional"], rel=1e-3)
    assert geometry["sentence"] == pytest.approx(geometry["plain bert"], rel=1e-3)
    for row in results["throughput"]:
        assert (
            row["captions"] == 2 * IMAGES and row["captions_per_second"] > 0 and row["tokens_per_second"] > 0
        )
    # what is measured is what the encoder gives
    first, second = (
        CaptionEncoder.from_pretrained(models.llm.path, adapter=root / "run" / "result").encode(
            texts, normalize=True
        )
        for texts in (FIRST, SECOND)
    )
    scores = first.double() @ second.double().T
    hits = (scores >= scores.diagonal()[:, None]).sum(1) == 1
    assert recall["run"]["recall"]["1"] == pytest.approx(hits.double().mean().item())
    llm = replace(models.llm, merge=(), adapter=str(root / "run"))
    adapted = evaluate_captions(replace(models, llm=llm, base=False, encoders={}, out=str(root / "c")))
    assert list(adapted["setup"]["models"]) == ["adapted"] and adapted["comparisons"] == []
    assert adapted["caption_retrieval"][0]["scores"]["recall"] == recall["run"]["recall"]


def test_what_cannot_be_measured(known: CaptionRetrievalSettings, root: Path, tmp_path: Path) -> None:
    for changes, message in (
        ({"out": ""}, "out is empty"),
        ({"sets": {}, "sts": {}}, "nothing to retrieve"),
        ({"encoders": {}}, "nothing to measure"),
        ({"baseline": "mine"}, "none of the encoders: constant, perfect"),
    ):
        with pytest.raises(ConfigError, match=message):
            evaluate_captions(replace(known, **changes))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="stand for other rows"):
        replace(known, encoders={"merged": "x"})
    with pytest.raises(ConfigError, match="dims"):
        replace(known, dims=(0,))
    with pytest.raises(ConfigError, match=r"limit: expected at least 2"):
        replace(known, limit=1)
    llm2vec_adapter(tmp_path / "adapter", tiny_model("llama"))
    with pytest.raises(ConfigError, match=r"is an adapter; set llm\.path"):
        evaluate_captions(replace(known, encoders={"a": str(tmp_path / "adapter")}))
    (tmp_path / "empty").mkdir()
    for path, problem in (
        (tmp_path / "empty", "holds no encoder.*found nothing"),
        (tmp_path / "absent", "no directory"),
    ):
        with pytest.raises(ModelError, match=problem):
            evaluate_captions(replace(known, encoders={"a": str(path)}))
    few = store(tmp_path / "few", {text: torch.ones(2) for text in FIRST})
    with pytest.raises(StoreError, match="lacks 60 of the captions"):
        evaluate_captions(replace(known, encoders={"few": few}))


def test_the_command(known: CaptionRetrievalSettings, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        f"sets.coco={root / 'coco.json'}", f"encoders.perfect={root / 'perfect'}", f"out={root / 'cli'}", "device=cpu",
    ]  # fmt: skip
    assert main(["evaluate", "caption-retrieval", *arguments]) == 0
    assert "Caption retrieval accuracy (CRA): coco" in capsys.readouterr().out
    assert (
        main(["evaluate", "caption-retrieval", arguments[0], f"captions_out={root / 'captions.jsonl'}"]) == 0
    )
    written = [json.loads(line)["caption"] for line in (root / "captions.jsonl").read_text().splitlines()]
    assert sorted(written) == sorted(FIRST + SECOND)
    assert main(["evaluate", "caption-retrieval", arguments[0]]) == 2
    assert "error: out is empty" in capsys.readouterr().err
