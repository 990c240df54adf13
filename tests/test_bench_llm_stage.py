"""The experiment of the LLM stage on tiny data: each kind of row runs once, is measured right, and is kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import llm_stage
from llm2clip.config import read_yaml
from tests.tiny_models import save_tiny
from tests.training_kit import records, write_set

CONFIG = """
llm: {max_length: 48}
lora: {rank: 2, dropout: 0.0}
optim: {lr: 1.0e-3, warmup_steps: 1}
run: {steps: 2, batch_size: 8, device: cpu, peak_tflops: 0}
"""


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    entries = [{"caption": r["name"], "alt": r["description"]} for r in records(44)]
    write_set(tmp_path / "data" / "set-train-0.tar", entries[:30])
    write_set(tmp_path / "data" / "set-val-0.tar", [*entries[30:], entries[30]], 30)
    llm = save_tiny(tmp_path / "llm", head=True, tie_word_embeddings=True)
    (tmp_path / "config.yaml").write_text(CONFIG)
    paths = {
        "data": tmp_path / "data",
        "llm": llm,
        "out": tmp_path / "out",
        "config": tmp_path / "config.yaml",
    }
    return [text for name, path in paths.items() for text in (f"--{name}", str(path))]


def test_rows_are_trained_measured_and_kept(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = ["raw-causal", "cc", "mntp", "mntp-cc"]
    llm_stage.main([*arguments, "--rows", *rows])
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["gallery"] == 14 and list(found["rows"]) == rows  # the figure that occurs twice counts once
    assert "steps" not in found["rows"]["raw-causal"] and found["rows"]["cc"]["steps"] == 2
    assert all(0 <= row["caption_to_alt_r1"] <= 100 for row in found["rows"].values())
    after = read_yaml(tmp_path / "out" / "mntp-cc" / "config.yaml")
    assert (
        after["llm"]["adapter"] == str(tmp_path / "out" / "mntp" / "result") and after["llm"]["bidirectional"]
    )
    assert read_yaml(tmp_path / "out" / "mntp" / "config.yaml")["objective"] == "mntp"
    assert found["rows"]["mntp-cc"]["minutes"] >= found["rows"]["mntp"]["minutes"]
    capsys.readouterr()
    llm_stage.main([*arguments, "--rows", *rows])
    shown = capsys.readouterr().out
    assert shown.startswith("| | caption") and shown.count("\n") == 2 + len(rows)  # nothing ran again


def test_a_row_that_builds_on_another_wants_it(arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match="row mntp-cc starts from row mntp; name both"):
        llm_stage.main([*arguments, "--rows", "mntp-cc"])


def test_minutes_become_steps(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    real = llm_stage.finetune_llm

    def remember(settings: llm_stage.FinetuneLLMSettings) -> Path:
        asked.append(settings.run.steps or 0)
        return real(settings)

    monkeypatch.setattr(llm_stage, "finetune_llm", remember)
    monkeypatch.setattr(llm_stage, "read_metrics", lambda path: [{"samples_per_second": 4.0}] * 6)
    llm_stage.main([*arguments, "--rows", "cc", "--minutes", "0.4"])
    assert asked == [6, 12]  # 24 seconds at 4 pairs a second in batches of 8


def test_short_rows_for_comparisons(arguments: list[str], tmp_path: Path) -> None:
    llm_stage.main([*arguments, "--rows", "cc-causal", "--steps", "3", "--batch", "4"])
    used = read_yaml(tmp_path / "out" / "cc-causal" / "config.yaml")
    assert (used["run"]["steps"], used["run"]["batch_size"], used["optim"]["warmup_steps"]) == (3, 4, 0)


def test_scores() -> None:
    short = torch.eye(4)
    long = torch.eye(4)[[0, 1, 3, 2]]
    assert llm_stage.scores(short, long)["caption_to_alt_r1"] == 50.0
    same = llm_stage.scores(torch.ones(4, 3), torch.ones(4, 3))
    assert same["alt_to_caption_r1"] == 0.0  # what tells nothing apart finds nothing
