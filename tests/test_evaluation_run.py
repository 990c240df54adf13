"""`evaluate` end to end: tiny random models, a tiny tar, real files; and the report it writes."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from llm2clip.data.store import EmbeddingStore
from llm2clip.embed import embed
from llm2clip.errors import ConfigError, StoreError
from llm2clip.evaluation import evaluate
from llm2clip.evaluation.caption_retrieval import base_encoder
from llm2clip.evaluation.retrieval import quick_retrieval
from llm2clip.models.caption_encoder import CaptionEncoder
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.settings import (
    CaptionSettings,
    DataSettings,
    EmbedSettings,
    EvaluateSettings,
    LLMSettings,
    LoraSettings,
    ModelSettings,
    VisionSettings,
)
from tests.data_files import image_bytes, write_tar
from tests.tiny_models import save_tiny

NASTY = "<script>alert(\"x\")</script> & 'quoted' https://example.org/a.png"
ITEMS = 24


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> EvaluateSettings:
    """A base LLM, an adapter that changes it, a CLIP model, a store and held-out shards."""
    root = tmp_path_factory.mktemp("evaluate")
    members = []
    for number in range(ITEMS):
        record = {
            "group": f"g{number}",
            "name": f"{NASTY} {number}",
            "description": f"a longer description of thing {number}",
            "es": {"name": f"cosa {number}"},
            "license": "CC BY-SA 3.0 <me>",
        }
        members += [
            (f"{number:03d}.png", image_bytes((number * 10, 9, 9))),
            (f"{number:03d}.json", json.dumps(record).encode()),
        ]
    members += [
        ("900.png", b"this is text"),
        ("900.json", json.dumps({"name": "broken"}).encode()),
    ]
    write_tar(root / "val-000000.tar", members)
    llm = save_tiny(root / "llm")
    encoder = CaptionEncoder.from_pretrained(llm)
    encoder.add_lora(LoraSettings(rank=2))
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    encoder.save_adapter(root / "stage1" / "result")
    lines = [{"step": s, "loss": 3.0 - s / 100, "samples_per_second": 50.0} for s in range(10, 100, 10)]
    (root / "stage1" / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 1'
    )
    captions = CaptionSettings(short=("name",), long=("description",), translations={"es": "es.name"})
    data = DataSettings(val=(str(root / "val-000000.tar"),), captions=captions, max_bad_share=0.2)
    settings = LLMSettings(path=str(llm), adapter=str(root / "stage1" / "result"))
    store = embed(EmbedSettings(data=data, llm=settings, out=str(root / "store"), device="cpu"))
    config = {"model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 24, "patch_size": 4,
              "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8}  # fmt: skip
    (root / "vision.json").write_text(json.dumps(config))
    vision = VisionSettings(kind="transformers", path=str(root / "vision.json"), image_size=8)
    model = LLM2CLIP(ModelSettings(vision=vision, embed_dim=6, adapter_depth=1), store.dim, store.fingerprint)
    model.save_pretrained(root / "stage2" / "result")
    return EvaluateSettings(
        data=data, model=str(root / "stage2"), store=str(root / "store"), llm=LLMSettings(path=str(llm)),
        llm_adapter=str(root / "stage1"), out=str(root / "report"), device="cpu",
    )  # fmt: skip


class Balanced(HTMLParser):
    """Collects open tags that never close, loaded addresses and the text."""

    VOID = frozenset({"meta", "img", "source", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.tags: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "srcset", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        self.text += data


def test_everything_at_once(ready: EvaluateSettings, capsys: pytest.CaptureFixture[str]) -> None:
    results = evaluate(ready)
    out = Path(ready.out)
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(results))
    encoders = {row["encoder"] for row in results["caption_retrieval"]}
    assert encoders == {"base LLM, causal", "base LLM, bidirectional", "fine-tuned LLM"}
    kinds = {(row["queries"], row["direction"]) for row in results["retrieval"]}
    assert kinds == {(k, d) for k in ("short", "long", "es") for d in ("text → image", "image → text")}
    for row in results["retrieval"]:
        assert row["scores"]["gallery"] == ITEMS  # the broken image left the gallery
        assert row["scores"]["chance"]["10"] == pytest.approx(10 / ITEMS)
    assert results["setup"]["bad_samples"] == 1 and "900" in results["setup"]["bad_examples"][0]
    shown = capsys.readouterr().out
    assert "Caption retrieval accuracy" in shown and "chance" in shown and "report.html" in shown


def test_the_report_is_whole_offline_and_escaped(ready: EvaluateSettings) -> None:
    evaluate(ready)
    page = (Path(ready.out) / "report.html").read_text()
    parser = Balanced()
    parser.feed(page)
    parser.close()
    assert parser.open == [] and "script" not in parser.tags
    assert all(address.startswith(("data:image/", "#")) for address in parser.addresses)
    assert not re.search(r"url\(|@import", page)
    assert '<script>alert("x")</script>' in parser.text  # shown as text, never as a tag
    for heading in (
        "Results",
        "Sample queries",
        "Similarity",
        "Training",
        "Setup",
        "licence and attribution",
    ):
        assert heading in parser.text
    assert "CC BY-SA 3.0 <me>" in parser.text and "Text → image, short captions" in parser.text
    assert "LLM stage" in parser.text and page.count('class="right') >= 6


def test_before_is_really_the_base_model(ready: EvaluateSettings) -> None:
    tuned = CaptionEncoder.from_settings(replace(ready.llm, adapter=ready.llm_adapter + "/result"))
    texts = ["one caption", "another, longer caption"]
    after = tuned.encode(texts)
    for bidirectional in (False, True):
        base = CaptionEncoder.from_settings(replace(ready.llm, bidirectional=bidirectional))
        with base_encoder(tuned, bidirectional=bidirectional):
            before = tuned.encode(texts)
        torch.testing.assert_close(before, base.encode(texts), rtol=1e-4, atol=1e-5)
        assert (before - after).abs().max() > 1e-2
    torch.testing.assert_close(tuned.encode(texts), after)


def test_captions_alone_and_images_alone(ready: EvaluateSettings, tmp_path: Path) -> None:
    alone = evaluate(replace(ready, model="", out=str(tmp_path / "captions")))
    assert alone["retrieval"] == [] and alone["caption_retrieval"]
    images = evaluate(replace(ready, llm=LLMSettings(), llm_adapter="", out=str(tmp_path / "images")))
    assert images["retrieval"] and {row["encoder"] for row in images["caption_retrieval"]} == {
        "fine-tuned LLM"
    }
    without_store = evaluate(replace(ready, store="", out=str(tmp_path / "computed")))
    for mine, stored in zip(without_store["retrieval"], images["retrieval"], strict=True):
        assert mine["scores"]["median_rank"] == pytest.approx(stored["scores"]["median_rank"], abs=1.5)


def test_wrong_input_is_named(ready: EvaluateSettings, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="out is empty"):
        evaluate(replace(ready, out=""))
    with pytest.raises(ConfigError, match="nothing to evaluate"):
        evaluate(replace(ready, model="", store="", llm=LLMSettings(), llm_adapter=""))
    with pytest.raises(ConfigError, match=r"data\.val is empty"):
        evaluate(replace(ready, data=DataSettings()))
    other = replace(ready.llm, prompt="another prompt")
    with pytest.warns(UserWarning, match="prompt"), pytest.raises(StoreError, match="prompt: stored ''"):
        evaluate(replace(ready, llm=other, out=str(tmp_path)))


def test_quick_retrieval_logs_recall_and_chance(ready: EvaluateSettings) -> None:
    model = LLM2CLIP.from_pretrained(ready.model + "/result").train()
    values = quick_retrieval(model, ready.data, EmbeddingStore.open(ready.store))
    assert model.training
    assert values["val/short/chance_r10"] == pytest.approx(10 / ITEMS)
    assert {"val/short/t2i_r10", "val/long/i2t_r1"} <= set(values) and not any(
        "es" in k.split("/")[1] for k in values
    )
