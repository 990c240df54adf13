"""The disk is full where a command writes: a clear error, the last good state whole, and it goes on."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.reliability.forks import run
from tests.reliability.full_disk import fill, goes_on, places, refused, undisturbed
from tests.reliability.scenarios import Scenario

Scenarios = dict[str, Scenario]


@pytest.mark.parametrize("name", ["data", "finetune-llm", "embed", "evaluate-retrieval", "export"])
def test_full_in_the_middle(scenarios: Scenarios, log: Path, name: str) -> None:
    # `python -m tests.reliability.full_disk` tries every place of every command
    fill(scenarios[name], log, len(places(scenarios[name])) // 2)


def test_full_from_the_start(scenarios: Scenarios, log: Path) -> None:
    fill(scenarios["data"], log, 0)


@pytest.fixture
def small_disk(scenarios: Scenarios) -> Iterator[str]:
    """The place where commands write, as a file system of its own; its size is set by remounting."""
    place = next(iter(scenarios.values())).out.parent
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(place)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"cannot mount a small file system here: {done.stderr.strip()}")
    (place / "tmp").mkdir()
    try:
        yield str(place)
    finally:
        subprocess.run(["umount", place], check=True)
        (place / "tmp").mkdir()


@pytest.mark.parametrize("name", ["finetune-llm", "embed", "export"])
def test_a_small_file_system(scenarios: Scenarios, log: Path, small_disk: str, name: str) -> None:
    """What native code writes fails too: there is room for a part of what the command needs."""
    scenario = scenarios[name]
    undisturbed(scenario)
    scenario.clear()
    assert run(scenario.work, log).code == 0
    needed = shutil.disk_usage(small_disk).used // 1024
    for share in (0.3, 0.7):
        scenario.clear()
        subprocess.run(["mount", "-o", f"remount,size={int(needed * share)}k", small_disk], check=True)
        child = run(scenario.work, log)
        assert child.code == 2, child.shown()
        refused(child.shown())
        subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
        goes_on(scenario, log)
