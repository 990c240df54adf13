"""The benchmark of a CLIP-stage step runs, its trainers agree, and a wrong one is caught."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest

from benchmarks import bench_clip_step, clip_trainers
from llm2clip.training.clip_batch import ImageTexts, Pieces

SMALL = [
    "--batch",
    "6",
    "--steps",
    "1",
    "--tower",
    "vit",
    "--image-size",
    "16",
    "--llm-dim",
    "16",
    "--no-save",
]


# whole, cut, and larger than what a loader gives in one piece
@pytest.mark.parametrize(("batch", "micro_batch"), [("6", "0"), ("6", "4"), ("70", "0")])
def test_all_trainers_have_one_loss_curve(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], batch: str, micro_batch: str
) -> None:
    sizes = ["--batch", batch, "--micro-batch", micro_batch]
    bench_clip_step.main([*SMALL, *sizes, "--data", str(tmp_path), "--overhead", "2"])
    shown = capsys.readouterr().out
    rows = [ast.literal_eval(line) for line in shown.splitlines() if line.startswith("{'provider'")]
    assert {"ours", "plain"} <= {row["provider"] for row in rows}
    assert len({row["losses"].split()[0] for row in rows}) == 1 and rows[0]["data"] == "random images"
    (ours,) = [row for row in rows if row["provider"] == "ours"]
    assert 0 <= ours["loop_outside_percent"] < 100 and ours["loop_step_ms"] > 0


def test_a_batch_too_large_to_compare_runs_in_the_loop_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*SMALL, "--data", str(tmp_path), "--steps", "0", "--overhead", "1", "--loop-only"]
    bench_clip_step.main(options)
    (row,) = [
        ast.literal_eval(ln) for ln in capsys.readouterr().out.splitlines() if ln.startswith("{'provider'")
    ]
    assert row["provider"] == "ours" and "losses" not in row
    assert row["loop_step_ms"] > 0 and row["loop_peak_memory_mib"] > 0 and 0 <= row["loop_data_wait"] <= 1
    with pytest.raises(SystemExit):
        bench_clip_step.main([*SMALL, "--loop-only"])


class Wrong(clip_trainers.Ours):
    """Leaves out a part of each batch."""

    def step(self, number: int, batch: ImageTexts | Pieces) -> float:
        return super().step(number, batch[:3])


class Broken(clip_trainers.Ours):
    """Fails in its process."""

    def step(self, number: int, batch: ImageTexts | Pieces) -> float:
        raise ValueError("this trainer is broken")


def test_a_trainer_that_learns_something_else_ends_the_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    makers: dict[str, Any] = clip_trainers.MAKERS | {"ours": Wrong}
    monkeypatch.setattr(clip_trainers, "MAKERS", makers)
    with pytest.raises(SystemExit, match="losses differ from those of plain"):
        bench_clip_step.main([*SMALL, "--data", str(tmp_path), "--providers", "plain", "ours"])
    with pytest.raises(SystemExit):
        bench_clip_step.main([*SMALL, "--providers", "ours"])


def test_what_goes_wrong_in_the_process_of_a_trainer_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clip_trainers, "MAKERS", clip_trainers.MAKERS | {"ours": Broken})
    with pytest.raises(RuntimeError, match="this trainer is broken"):
        bench_clip_step.main([*SMALL, "--data", str(tmp_path), "--providers", "plain", "ours"])
