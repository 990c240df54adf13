"""Three gloo ranks of which one goes wrong: the others stop in time and say why, and the run goes on afterwards."""

from __future__ import annotations

import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llm2clip.cli import main
from llm2clip.config import dump_yaml
from llm2clip.errors import DataError
from llm2clip.settings import TrainSettings
from llm2clip.training import checkpoint, failures
from llm2clip.training.clip_task import ClipTask
from llm2clip.training.metrics import read_metrics
from tests.reliability import evidence
from tests.reliability.forks import Child, run, start
from tests.reliability.scenarios import Scenario
from tests.training_kit import Kit

pytestmark = pytest.mark.dist
WORLD, BAD = 3, 1
# a step's number; the checkpoint of the step before is the last good state
AT = 3
Fault = Callable[[], None]


@pytest.fixture
def settings(scenarios: dict[str, Scenario], tmp_path: Path) -> TrainSettings:
    kit = Kit(scenarios["train"].out.parents[1] / "kit")
    return kit.clip_stage(tmp_path / "run", dropout=0.0, batch_size=9, steps=5, save_every=1, timeout=8.0)


def launch(settings: TrainSettings, folder: Path, fault: Fault | None = None) -> list[Child]:
    """Start the stage on three ranks, the bad one with its fault."""
    (folder / "run.yaml").write_text(dump_yaml(settings))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def prepare(rank: int) -> None:
        names = {"MASTER_PORT": port, "WORLD_SIZE": WORLD, "RANK": rank, "LOCAL_RANK": rank}
        os.environ |= {"MASTER_ADDR": "127.0.0.1"} | {name: str(value) for name, value in names.items()}
        failures._PATIENCE, failures._GRACE = 1.0, 1.0
        if fault is not None and rank == BAD:
            fault()

    def work() -> int:
        return main(["train", "--config", str(folder / "run.yaml")])

    return [
        start(work, folder / f"rank-{rank}.log", lambda rank=rank: prepare(rank)) for rank in range(WORLD)
    ]


def in_step(act: Callable[[Any], Any]) -> Fault:
    """What the bad rank does to its loss in step `AT`."""

    def fault() -> None:
        loss, calls = ClipTask.loss, iter(range(1, 1 << 62))

        def changed(self: ClipTask, outputs: Any) -> Any:
            value, metrics = loss(self, outputs)
            return (act(value) if next(calls) == AT else value), metrics

        ClipTask.loss = changed  # type: ignore[method-assign]

    return fault


def in_batches(change: Callable[[int, Any], Any]) -> Fault:
    """What the bad rank gets as its samples of batch n (from 1)."""

    def fault() -> None:
        batches = ClipTask.batches

        def changed(self: ClipTask, epoch: int, batch: int) -> Iterator[Any]:
            for number, (position, samples) in enumerate(batches(self, epoch, batch), 1):
                left = change(number, samples)
                if left is None:
                    return
                yield position, left

        ClipTask.batches = changed  # type: ignore[method-assign]

    return fault


def _die(value: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def _hang(value: Any) -> Any:
    time.sleep(1000)


def _lost(number: int, samples: Any) -> Any:
    if number == AT:
        raise DataError("the shard of this rank is gone")
    return samples


FAULTS = {
    "dies": (in_step(_die), -signal.SIGKILL, "another rank is gone without a word"),
    "hangs": (in_step(_hang), 2, "did not answer within run.timeout"),
    "not a number": (in_step(lambda value: value * torch.nan), 2, f"step {AT}: loss .* is not finite"),
    "shard gone": (in_batches(_lost), 2, f"rank {BAD} failed: the shard of this rank is gone"),
    "no data left": (
        in_batches(lambda number, samples: samples if number < AT else None),
        2,
        f"rank {BAD} failed: the data of this rank ended before the run did",
    ),
    "nothing usable": (
        in_batches(lambda number, samples: samples if number < AT else samples[:0]),
        2,
        "100 batches in a row were left out",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_one_stops_all(settings: TrainSettings, tmp_path: Path, name: str) -> None:
    fault, code, reason = FAULTS[name]
    ranks = launch(settings, tmp_path, fault)
    try:
        codes = [child.wait(60) for child in ranks]
    finally:
        for child in ranks:
            child.kill()
    shown = [child.shown() for child in ranks]
    assert codes == [code if rank == BAD else 2 for rank in range(WORLD)], shown
    for rank, text in enumerate(shown):
        errors = [line for line in text.splitlines() if line.startswith("error: ")]
        if rank == BAD and name == "dies":
            continue
        assert len(errors) == 1 and "Traceback" not in text, text
        if rank != BAD:
            assert re.search(reason, errors[0]), errors
    out = Path(settings.run.out)
    evidence.check_run(out)
    assert not evidence.left_over(out) and not (out / "result").exists()
    newest = checkpoint.latest(out)
    assert newest is not None and newest.name == f"step_{AT - 1:08d}"
    # any number of ranks goes on with it; one process is quickest
    alone = run(lambda: main(["train", "--config", str(tmp_path / "run.yaml")]), tmp_path / "alone.log")
    assert alone.code == 0, alone.shown()
    assert [line["step"] for line in read_metrics(out / "metrics.jsonl") if "loss" in line] == [1, 2, 3, 4, 5]


def test_three_go_on_after_a_fault_with_uneven_batches(settings: TrainSettings, tmp_path: Path) -> None:
    # ten samples cannot be divided by three, and the bad rank loses some of its own in the second attempt
    uneven = replace(settings, run=replace(settings.run, batch_size=10))
    assert [child.wait(60) for child in launch(uneven, tmp_path, in_step(_die))] == [2, -signal.SIGKILL, 2]
    fewer = in_batches(lambda number, samples: samples[: (2, 0, 1)[number % 3]])
    ranks = launch(uneven, tmp_path, fewer)
    assert [child.wait(60) for child in ranks] == [0, 0, 0], [child.shown() for child in ranks]
    out = Path(settings.run.out)
    assert (out / "result" / "DONE").exists() and not evidence.left_over(out)
    assert [line["step"] for line in read_metrics(out / "metrics.jsonl") if "loss" in line] == [1, 2, 3, 4, 5]
