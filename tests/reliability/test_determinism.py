"""One seed, one machine: the same losses and weights, bit by bit, over 100 steps, however they were come by."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llm2clip.cli import main
from llm2clip.config import dump_yaml
from llm2clip.training.clip_task import ClipTask
from llm2clip.training.llm_task import LLMTask
from tests.reliability.forks import Prepare, during, run, to_group
from tests.reliability.scenarios import Scenario
from tests.training_kit import Kit, assert_same_run, curve

STEPS = 100


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "stage", "task"),
    [("finetune-llm", Kit.llm_stage, LLMTask), ("train", Kit.clip_stage, ClipTask)],
)
def test_a_hundred_steps_are_the_same(
    scenarios: dict[str, Scenario],
    tmp_path: Path,
    command: str,
    stage: Callable[..., Any],
    task: type,
) -> None:
    kit = Kit(scenarios["train"].out.parents[1] / "kit")

    def train(name: str, prepare: Prepare | None = None, **options: Any) -> None:
        common = {"steps": STEPS, "save_every": STEPS, "keep_checkpoints": 1}
        settings = stage(kit, tmp_path / name, **common, **options)
        (tmp_path / f"{name}.yaml").write_text(dump_yaml(settings))
        argv = [command, "--config", str(tmp_path / f"{name}.yaml")]
        child = run(lambda: main(argv), tmp_path / f"{name}.log", prepare)
        assert child.code == 0, child.shown()

    train("once")
    losses = [line["loss"] for line in curve(tmp_path / "once") if "loss" in line]
    assert len(set(losses)) == len(losses) == STEPS
    train("workers", workers=2)
    assert_same_run(tmp_path / "once", tmp_path / "workers")
    # stopped in an epoch's middle, and ended with another number of workers
    train("resumed", during(task, "chunks", 52, to_group(signal.SIGUSR1)), workers=2)
    assert [line["step"] for line in curve(tmp_path / "resumed")][-1] == 53
    train("resumed", workers=0)
    assert_same_run(tmp_path / "once", tmp_path / "resumed")
    # and another seed is another run
    other = stage(kit, tmp_path / "other", steps=2, seed=1)
    (tmp_path / "other.yaml").write_text(dump_yaml(other))
    child = run(lambda: main([command, "--config", str(tmp_path / "other.yaml")]), tmp_path / "other.log")
    assert child.code == 0 and curve(tmp_path / "other")[0]["loss"] != losses[0]
