"""What a training process frees it keeps while it trains on a CPU, and gives back afterwards."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch

from llm2clip.training import kept_memory as module
from llm2clip.training.kept_memory import kept_memory
from llm2clip.training.world import start_world

CPU = torch.device("cpu")
# above what glibc's own threshold can reach, so that each block comes from the system and goes back to it
BLOCK = 48 << 20
PAGE = os.sysconf("SC_PAGE_SIZE")
WAYS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "alone": lambda: kept_memory(CPU),
    "a training run": lambda: start_world("cpu"),
}
glibc = pytest.mark.skipif(
    module._mallopt() is None, reason="needs glibc with thresholds that nobody has set"
)


def steps() -> int:
    """Pages that the system hands out while a block is filled and freed three times."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        torch.empty(BLOCK, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def measure(kept: Callable[[], AbstractContextManager[Any]]) -> None:
    """In a process of its own, since its heap must not have been used: what happens before, inside and after."""
    steps()
    found = {"faults_before": steps(), "resident_before": resident()}
    try:
        with kept():
            torch.empty(8 * BLOCK, dtype=torch.uint8).fill_(1)
            found["resident_inside"] = resident()
            for _ in range(4):  # until the heap has its final form
                steps()
            found["faults_inside"] = steps()
            raise KeyError("from inside")
    except KeyError:
        found["resident_after"] = resident()
    print(json.dumps(found))


def in_process(way: str) -> dict[str, int]:
    code = f"from tests import test_training_kept_memory as t; t.measure(t.WAYS[{way!r}])"
    env = {k: v for k, v in os.environ.items() if k != "WORLD_SIZE"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


@glibc
@pytest.mark.parametrize("way", WAYS)
def test_what_is_freed_is_used_again_and_given_back_at_the_end(way: str) -> None:
    found = in_process(way)
    blocks = 3 * BLOCK // PAGE
    assert found["faults_before"] > blocks // 2, "the process keeps it anyway: this test shows nothing"
    assert found["faults_inside"] < blocks // 50
    assert found["resident_inside"] - found["resident_before"] > 7 * BLOCK
    # after an error as well
    assert found["resident_after"] - found["resident_before"] < BLOCK


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MALLOC_MMAP_THRESHOLD_", "1048576"),
        ("MALLOC_TRIM_THRESHOLD_", "1048576"),
        ("GLIBC_TUNABLES", "glibc.malloc.arena_max=2:glibc.malloc.mmap_threshold=1048576"),
    ],
)
def test_what_the_user_has_chosen_stays(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with kept_memory(CPU) as kept:
        assert not kept


@glibc
def test_other_tunables_choose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.arena_max=2")
    with kept_memory(CPU) as kept:
        assert kept


def test_another_device_or_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with kept_memory(torch.device("cuda")) as kept:
        assert not kept

    def unknown(name: str) -> str:
        raise ValueError(f"unrecognized configuration name {name}")

    monkeypatch.setattr(os, "confstr", unknown)
    with kept_memory(CPU) as kept:
        assert not kept
