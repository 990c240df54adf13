"""The demo: which caption plays which role, bad input, and the whole of it with tiny models, killed and repeated."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llm2clip.config import read_yaml
from llm2clip.demo import SETTINGS, _fill, _sections, guess_roles, prepare_data, prepare_llm, run_demo
from llm2clip.errors import ConfigError, DataError
from llm2clip.settings import EmbedSettings, EvaluateSettings, FinetuneLLMSettings, TrainSettings
from tests.data_files import SHARED
from tests.tiny_models import save_tiny
from tests.training_kit import CLIP_VISION, records, wait_for, write_set

OPENSTAX = SHARED / "openstax"


def figures(count: int, start: int = 0) -> list[dict[str, Any]]:
    """Records as in the textbook shards: a caption, a longer description, both in Spanish, credits."""
    return [
        {
            "caption": f"Figure {number} shows a cell.",
            "alt": f"A drawing of cell number {number} with its nucleus in the middle and arrows around it.",
            "credit": "a long list of people and institutions that nobody wants as a caption of this figure",
            "es": {"caption": f"Figura {number}", "alt": f"Un dibujo de la célula número {number}."},
            "pl": {"alt": f"Rysunek komórki numer {number}."},
            "license": "CC BY 4.0",
        }
        for number in range(start, start + count)
    ]


def test_roles_are_guessed_by_length(tmp_path: Path) -> None:
    shard = str(write_set(tmp_path / "a.tar", figures(10)))
    assert guess_roles([shard], [shard], 2) == ("caption", "alt", {"es": "es.caption", "pl": "pl.alt"})
    assert guess_roles([shard], [shard], 1)[2] == {"es": "es.caption"}
    shard = str(write_set(tmp_path / "b.tar", records(10)))
    assert guess_roles([shard], [shard], 2) == ("name", "description", {"es": "es.name"})
    # a field of a few samples is no role, however short it is
    mixed = [{**record, "tag": "x"} if number < 3 else record for number, record in enumerate(records(10))]
    assert guess_roles(*[[str(write_set(tmp_path / "c.tar", mixed))]] * 2, 0) == ("name", "description", {})


def test_roles_of_the_textbook_shards() -> None:
    shards = sorted(map(str, OPENSTAX.glob("*train*.tar")))
    if not shards:
        pytest.skip(f"no textbook shards in {OPENSTAX}")
    short, long, translations = guess_roles(shards, shards, 2)
    assert (short, long) == ("caption", "alt")
    assert translations["es"].startswith("es.") and len(translations) == 2
    held_out = sorted(map(str, OPENSTAX.glob("*val*.tar")))
    # no held-out book has a Spanish edition
    assert guess_roles(shards, held_out, 2)[2] == {"pl": "pl.caption"}


def test_folders_train_and_val_are_data(tmp_path: Path) -> None:
    for split, start in (("train", 0), ("val", 50)):
        (tmp_path / split).mkdir()
        write_set(tmp_path / split / "a.tar", records(6, start))
    found = prepare_data(str(tmp_path), tmp_path / "out", {})
    assert (found.train, found.val) == ((str(tmp_path / "train"),), (str(tmp_path / "val"),))
    assert (found.short, found.long) == (("name",), ("description",))


def test_one_caption_field_is_not_enough(tmp_path: Path) -> None:
    for number, fields in enumerate(({"name": "a"}, {"license": "x"})):
        shard = str(write_set(tmp_path / f"{number}.tar", [fields] * 3))
        with pytest.raises(
            DataError, match=f"two caption fields .* found {'name' if number == 0 else 'none'}"
        ):
            guess_roles([shard], [shard], 2)


def test_directories_are_described(tmp_path: Path) -> None:
    write_set(tmp_path / "x-train-000000.tar", records(6))
    write_set(tmp_path / "x-train-000001.tar", records(6, 6))
    with pytest.raises(DataError, match=r"expected folders train and val, .* found x-train-000000\.tar"):
        prepare_data(str(tmp_path), tmp_path / "out", {})
    write_set(tmp_path / "x-val-000000.tar", records(4, 50))
    found = prepare_data(str(tmp_path), tmp_path / "out", {"translations": 1})
    assert [Path(p).name for p in found.train] == ["x-train-000000.tar", "x-train-000001.tar"]
    assert [Path(p).name for p in found.val] == ["x-val-000000.tar"]
    assert (found.short, found.long, found.translations) == (("name",), ("description",), {"es": "es.name"})
    described = {
        "shards": {"train": ["x-train-000001.tar"], "val": ["x-val-000000.tar"]},
        "captions": {"short": ["title", "name"], "long": ["description"]},
        "translations": {"ja": "ja.name", "fr": "fr.name", "es": "es.name"},
    }
    (tmp_path / "dataset.json").write_text(json.dumps(described))
    found = prepare_data(str(tmp_path), tmp_path / "out", {})
    assert found.train == (str(tmp_path / "x-train-000001.tar"),) and found.short == ("title", "name")
    assert list(found.translations) == ["es", "fr"]
    for damaged in ("{", "{}", "[]", json.dumps(described | {"captions": {"short": ["a"]}})):
        (tmp_path / "dataset.json").write_text(damaged)
        with pytest.raises(DataError, match=r"dataset\.json"):
            prepare_data(str(tmp_path), tmp_path / "out", {})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"val_shar": 0.1}, "unknown val_shar; it has translations, val_share"),
        ({"val_share": 1.5}, "val_share: expected a share between 0 and 1, got 1.5"),
        ({"val_share": "much"}, "val_share"),
        ({"translations": -1}, "translations: expected a number"),
        ({"translations": "es"}, "translations: expected a number"),
    ],
)
def test_wrong_data_settings_are_named(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare_data("cataclysm", tmp_path, settings)
    with pytest.raises(DataError, match="expected `cataclysm` or a directory"):
        prepare_data(str(tmp_path / "none"), tmp_path, {})
    assert os.listdir(tmp_path) == []


def test_sections(tmp_path: Path) -> None:
    own = _sections(None)
    assert own == read_yaml(SETTINGS)
    path = tmp_path / "a.yaml"
    path.write_text("train: {run: {steps: 3}}\nembed:\n")
    sections = _sections(str(path))
    assert sections["train"] == {"run": {"steps": 3}} and sections["embed"] == {} == sections["evaluate"]
    for text, message in (
        ("trian: {}\n", "unknown section trian; the demo has data, finetune-llm"),
        ("train: 5\n", "section train: expected a group of settings, got 5"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            _sections(str(path))


def test_settings_are_filled() -> None:
    known = {"run": {"out": "here", "steps": 9}, "data": {"train": ("a",)}}
    sections = {"train": {"run": {"steps": 3}, "model": None, "data": None}}
    settings = _fill(TrainSettings, sections, known)
    assert (settings.run.out, settings.run.steps, settings.data.train) == ("here", 3, ("a",))
    assert known == {"run": {"out": "here", "steps": 9}, "data": {"train": ("a",)}}
    with pytest.raises(
        ConfigError, match=r"unknown setting run\.step \(section train\); did you mean run\.steps"
    ):
        _fill(TrainSettings, {"train": {"run": {"step": 3}}}, known)
    with pytest.raises(ConfigError, match=r"run \(section train\): expected a group"):
        _fill(TrainSettings, {"train": {"run": 3}}, known)
    # the demo's own file is valid for every command
    for command in (FinetuneLLMSettings, EmbedSettings, TrainSettings, EvaluateSettings):
        _fill(command, _sections(None))


def test_a_converted_llm_is_used_as_it_is(tmp_path: Path) -> None:
    save_tiny(tmp_path / "llm")
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "llm").iterdir()}
    assert prepare_llm(tmp_path / "llm") == str(tmp_path / "llm")
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "llm").iterdir()} == before


@pytest.fixture
def tiny_demo(tmp_path: Path) -> tuple[str, str, str]:
    """Data, output directory with a tiny LLM in it, and settings for a demo of seconds."""
    for shard in range(2):
        write_set(tmp_path / "shards" / f"train-{shard:06d}.tar", records(30, 30 * shard), 30 * shard)
    write_set(tmp_path / "shards" / "val-000000.tar", records(20, 100), 100)
    save_tiny(tmp_path / "out" / "llm")
    (tmp_path / "vision.json").write_text(json.dumps(CLIP_VISION))
    vision = {"kind": "transformers", "path": str(tmp_path / "vision.json"), "image_size": 8}
    run = {"device": "cpu", "log_every": 1, "batch_size": 16, "save_every": 3}
    sections = {
        "finetune-llm": {"lora": {"rank": 2}, "run": {**run, "steps": 12}},
        "embed": {"device": "cpu", "commit_rows": 16},
        "train": {
            "model": {"vision": vision, "embed_dim": 8, "adapter_depth": 1},
            "run": {**run, "steps": 30},
        },
        "evaluate": {"device": "cpu"},
    }
    (tmp_path / "demo.yaml").write_text(json.dumps(sections))  # JSON is YAML
    return str(tmp_path / "shards"), str(tmp_path / "out"), str(tmp_path / "demo.yaml")


def lines(out: str, stage: str) -> list[int]:
    text = (Path(out) / stage / "metrics.jsonl").read_text().splitlines()
    return [line["step"] for line in map(json.loads, text) if "loss" in line]


def stamps(out: str) -> dict[str, int]:
    """Modification times of everything but the report and the store's lock."""
    return {
        str(p.relative_to(out)): p.stat().st_mtime_ns
        for p in Path(out).rglob("*")
        if p.is_file() and p.name not in ("report.html", "results.json", ".lock")
    }


def test_the_whole_demo_and_again(
    tiny_demo: tuple[str, str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    data, out, config = tiny_demo
    assert run_demo(data, out, config) == 0
    shown = capsys.readouterr()
    assert all(f"[{step}/6]" in shown.err for step in range(1, 7))
    assert "report.html" in shown.out and "chance" in shown.out
    results = json.loads((Path(out) / "results.json").read_text())
    assert {row["encoder"] for row in results["caption_retrieval"]} >= {
        "base LLM, bidirectional",
        "fine-tuned LLM",
    }
    assert {row["queries"] for row in results["retrieval"]} == {"short", "long", "es"}
    assert (lines(out, "llm-stage"), lines(out, "clip-stage")) == (list(range(1, 13)), list(range(1, 31)))

    before = stamps(out)
    (Path(out) / "report.html").unlink()
    assert run_demo(data, out, config) == 0
    assert stamps(out) == before and (Path(out) / "report.html").exists()
    again = json.loads((Path(out) / "results.json").read_text())
    for name in ("caption_retrieval", "retrieval"):
        assert again[name] == results[name]


@pytest.mark.slow
def test_the_demo_goes_on_after_kills(tiny_demo: tuple[str, str, str], tmp_path: Path) -> None:
    data, out, config = tiny_demo
    root = Path(__file__).resolve().parents[1]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(root / "kernels"), str(root)]),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "llm2clip", "demo", "--data", data, "--out", out, "--config", config]
    moments = [
        (Path(out) / "llm-stage" / "checkpoints" / "step_00000006", signal.SIGKILL, -signal.SIGKILL),
        (Path(out) / "clip-stage" / "checkpoints" / "step_00000003", signal.SIGTERM, 143),
    ]
    for moment, number, status in moments:
        child = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        try:
            wait_for(moment.exists, 60)
            child.send_signal(number)
            _, shown = child.communicate(timeout=60)
        finally:
            child.kill()
        assert child.returncode == status, shown
        assert not (Path(out) / "report.html").exists()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "other settings" not in done.stderr

    whole = str(tmp_path / "whole")
    save_tiny(Path(whole) / "llm")
    assert run_demo(data, whole, config) == 0
    assert lines(out, "llm-stage") == lines(whole, "llm-stage")
    assert lines(out, "clip-stage") == lines(whole, "clip-stage")
    mine, theirs = (json.loads((Path(path) / "results.json").read_text()) for path in (out, whole))
    for name in ("caption_retrieval", "retrieval"):
        assert mine[name] == theirs[name]
