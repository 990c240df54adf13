"""The experiment of the CLIP stage on tiny data: what is held out, what is cut, and that every table is filled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import clip_stage, held_out
from benchmarks.clip_recipe import caption_texts
from llm2clip.config import from_tree, read_yaml
from llm2clip.data.store import EmbeddingStore
from llm2clip.errors import DataError
from llm2clip.settings import FinetuneLLMSettings
from llm2clip.training.run import finetune_llm
from tests.tiny_models import save_tiny
from tests.training_kit import records, write_set

LLM = "llm: {max_length: 48}\n"


def figures(count: int, book: str, start: int = 0, **more: Any) -> list[dict[str, Any]]:
    """Samples of a book; every third description is longer than CLIP could read."""
    found = []
    for place, entry in enumerate(records(count, start)):
        alt = " ".join([entry["description"]] * (40 if place % 3 == 0 else 1))
        found.append({"caption": entry["name"], "alt": alt, "book": book, **more})
    return found


def translated(entry: dict[str, Any]) -> dict[str, Any]:
    return entry | {name: {"alt": f"{name} {entry['alt']}"} for name in held_out.LANGUAGES}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    physics = [translated(entry) for entry in figures(12, "osbooks-university-physics-bundle")]
    again = [{**physics[0], "caption": "the same description under another caption", "es": None}]
    others = figures(20, "osbooks-biology", start=12)
    write_set(tmp_path / "shards" / "openstax-train-000000.tar", [*physics, *again, *others])
    write_set(
        tmp_path / "shards" / "openstax-val-000000.tar", figures(12, "osbooks-us-history", start=32), 40
    )
    return tmp_path / "shards"


def read(path: Path) -> list[dict[str, Any]]:
    return [record for _, _, record in held_out.samples(path)]


def test_held_out_figures_leave_training_with_whoever_shares_their_texts(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert held_out.split(data, out, count=4) == {"held_out": 4, "left_for_training": 33 - 4 - 1}
    held, left = read(out / held_out.PHYSICS), read(out / "openstax-train-000000.tar")
    assert len(held) == 4 and all("physics" in record["book"] and record["pl"] for record in held)
    texts = {text for record in held for text in held_out.texts(record)}
    assert texts.isdisjoint(text for record in left for text in held_out.texts(record))
    assert (out / "openstax-val-000000.tar").read_bytes() == (data / "openstax-val-000000.tar").read_bytes()
    with pytest.raises(DataError, match="12 physics figures .* 13 are needed"):
        held_out.split(data, out, count=13)


def test_towers_are_trained_and_every_table_is_filled(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    split, out = tmp_path / "split", tmp_path / "out"
    held_out.split(data, split, count=4)
    llm = save_tiny(tmp_path / "llm", head=True, tie_word_embeddings=True)
    (tmp_path / "config.yaml").write_text(LLM)
    tree = {
        "data": {"train": [str(split / "openstax-train-*.tar")]},
        "llm": {"path": str(llm), "max_length": 48},
        "lora": {"rank": 2, "dropout": 0.0},
        "run": {"out": str(tmp_path / "cc"), "steps": 1, "batch_size": 8, "device": "cpu", "peak_tflops": 0},
    }
    adapter = finetune_llm(from_tree(FinetuneLLMSettings, tree))
    monkeypatch.setitem(clip_stage._VIT, "hidden_size", 16)
    monkeypatch.setitem(clip_stage._VIT, "num_hidden_layers", 1)
    options = {"data": split, "llm": llm, "adapter": adapter, "out": out, "config": tmp_path / "config.yaml"}
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    arguments += ["--towers", "vit", "--teachers", "tuned", "raw", "--steps", "2", "--batch", "8"]
    arguments += ["--seeds", "0", "1", "--noise", "0.5"]
    clip_stage.main([*arguments, "--set", "optim.ema=0.5", "optim.lr_scales.adapter=0.3"])
    for run in ("vit-tuned-0", "vit-raw-1"):
        optim = read_yaml(out / run / "config.yaml")["optim"]
        assert optim["ema"] == 0.5 and optim["lr_scales"] == {"adapter": 0.3} and optim["lr"] == 1e-3
    texts = caption_texts([str(split / "openstax-train-*.tar")])
    for name in ("tuned", "raw"):
        unit = torch.nn.functional.normalize(
            EmbeddingStore.open(out / f"store-{name}").get(texts).float(), dim=1
        )
        spread = (1 - unit.mean(0).square().sum()).sqrt().item()  # of vectors of length one
        noise = read_yaml(out / f"vit-{name}-1" / "config.yaml")["model"]["adapter_noise"]
        assert 0 < noise == pytest.approx(0.5 * spread, abs=1e-4)
    table = capsys.readouterr().out
    assert table.count("ViT, random weights | CC-tuned LLM") == 1 and table.count("| raw LLM |") == 1
    for what in ("longer than 77 tokens", "first 77 tokens"):
        assert table.count(what) == 1, what
    for what in ("English", "Spanish", "Polish"):
        assert table.count(f"physics, {what} |") == table.count(f"physics, {what}, centred |") == 1, what
    found = json.loads((out / "results.json").read_text())
    assert [run["seed"] for run in found["runs"]] == [0, 1]
    run = found["runs"][0]
    assert run["books"]["tuned long"]["gallery"] == 12 and set(run["physics"]) >= {"tuned es", "tuned pl"}
    assert run["whole"]["tuned long"]["gallery"] == run["first-77"]["tuned long"]["gallery"] == 4
    whole, cut = (read(out / name / "openstax-val-000000.tar") for name in ("whole", "first-77"))
    for one, other in zip(whole, cut, strict=True):
        assert one["caption"] == other["caption"] and one["alt"].startswith(other["alt"][:20])
        assert len(other["alt"]) < len(one["alt"])
