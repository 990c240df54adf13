"""SIGTERM and SIGUSR1 to the whole process group of a command: it ends in order, and the same command goes on."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from llm2clip.data.shards import ShardWriter
from llm2clip.data.store_writer import StoreWriter
from llm2clip.training import checkpoint
from llm2clip.training.clip_reader import Reader
from llm2clip.training.clip_task import ClipTask
from llm2clip.training.llm_task import LLMTask
from tests.reliability import evidence
from tests.reliability.forks import Prepare, during, run, start, to_group
from tests.reliability.full_disk import undisturbed
from tests.reliability.scenarios import Scenario, temporary
from tests.training_kit import wait_for

Scenarios = dict[str, Scenario]


def _stop_then_finish(scenario: Scenario, log: Path, prepare: Prepare, code: int) -> str:
    """Stop a run in its middle, end it undisturbed, and compare with a run that was never stopped."""
    expected = undisturbed(scenario).facts
    scenario.clear()
    child = run(scenario.work, log, prepare)
    shown = child.shown()
    assert child.code == code, shown
    assert "stopped; the same command goes on where it was" in shown and "Traceback" not in shown
    scenario.check(scenario.out)
    assert not scenario.out.exists() or not evidence.left_over(scenario.out)
    stopped = sorted(path.name for path in scenario.out.rglob("*"))
    assert run(scenario.work, log).code == 0
    assert evidence.differences(scenario.facts(scenario.out), expected) == []
    return " ".join(stopped)


@pytest.mark.parametrize(
    ("name", "task", "number", "code"),
    [("finetune-llm", LLMTask, signal.SIGUSR1, 0), ("train", ClipTask, signal.SIGTERM, 143)],
)
def test_training_finishes_its_step(
    scenarios: Scenarios, log: Path, name: str, task: type, number: int, code: int
) -> None:
    # to the workers of `train` too, which must still deliver the samples of this step
    at = during(task, "chunks", 4, to_group(number))
    shown = _stop_then_finish(scenarios[name], log, at, code)
    assert "step_00000005" in shown and "step_00000006" not in shown


def test_a_step_that_waits_for_its_samples_gets_them(scenarios: Scenarios, log: Path) -> None:
    # the signal comes while workers read: those of torch would die of it, and the step with them
    scenario = scenarios["train"]
    scenario.clear()

    def prepare() -> None:
        main, read = os.getpid(), Reader.__call__

        def slow(self: Reader, *args: Any) -> Any:
            if os.getpid() != main:
                with contextlib.suppress(FileExistsError):
                    os.close(os.open(log.with_name("sent"), os.O_CREAT | os.O_EXCL))
                    os.killpg(os.getpgid(0), signal.SIGTERM)
                time.sleep(0.02)
            return read(self, *args)

        Reader.__call__ = slow  # type: ignore[method-assign]

    child = run(scenario.work, log, prepare)
    assert child.code == 143, child.shown()
    newest = checkpoint.latest(scenario.out)
    assert newest is not None and newest.name == "step_00000001"


@pytest.mark.parametrize(
    ("name", "number", "code"),
    [("embed", signal.SIGUSR1, 0), ("embed", signal.SIGINT, 130), ("embed-images", signal.SIGTERM, 143)],
)
def test_embedding_keeps_what_is_computed(
    scenarios: Scenarios, log: Path, name: str, number: int, code: int
) -> None:
    shown = _stop_then_finish(
        scenarios[name], log, during(StoreWriter, "_commit_pending", 3, to_group(number)), code
    )
    assert "part-" in shown or "shard-" in shown


def test_a_data_set_that_was_stopped_is_built_anew(scenarios: Scenarios, log: Path) -> None:
    at = during(ShardWriter, "add", 5, to_group(signal.SIGTERM))
    assert _stop_then_finish(scenarios["data"], log, at, 143) == ""
    assert list(temporary(scenarios["data"].out).glob("llm2clip-*")) == []  # where the package was unpacked


@pytest.mark.parametrize(
    ("name", "owner", "method"), [("data", ShardWriter, "close"), ("embed", StoreWriter, "_commit_pending")]
)
def test_the_second_signal_ends_at_once(
    scenarios: Scenarios, log: Path, name: str, owner: type, method: str
) -> None:
    scenario = scenarios[name]
    scenario.clear()
    entered = log.with_name("entered")

    def hang() -> None:
        while True:
            with contextlib.suppress(SystemExit):  # what the first signal raises, kept from getting anywhere
                entered.touch()  # only here: a signal that came before the `with` would end the child
                time.sleep(60)

    child = start(scenario.work, log, during(owner, method, 0, hang))
    try:
        wait_for(lambda: entered.exists() or not child.alive(), 60)
        child.signal(signal.SIGTERM)
        # a second one that came before the first was handled would count as none
        wait_for(lambda: not child.alive() or not child.catches(signal.SIGTERM))
        assert child.alive(), child.shown()
        child.signal(signal.SIGTERM)
        assert child.wait(5) == -signal.SIGTERM
    finally:
        child.kill()
    scenario.check(scenario.out)
