"""Processes leave their group only when gloo's workers are at rest: none hangs, none aborts."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch.distributed as dist

from llm2clip.training import world
from llm2clip.training.gloo_workers import wait_for_workers
from tests.training_kit import wait_for

pytestmark = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux's list of threads")

# a rank whose gloo workers get no processor time while the main thread, on the same core, wants it
_RANK = """
import os, sys
import torch, torch.distributed as dist
from llm2clip.training import world as worlds

rank, port = int(sys.argv[1]), sys.argv[2]
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "RANK": str(rank)}
torch.set_num_threads(1)

def job():
    with worlds.start_world("cpu", timeout=60.0) as world:
        model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
        model(torch.ones(1, 2)).sum().backward()
        for thread in os.listdir("/proc/self/task"):
            with open(f"/proc/self/task/{thread}/comm") as file:
                if "gloo_run" in file.read():
                    os.sched_setscheduler(int(thread), os.SCHED_IDLE, os.sched_param(0))
        for number in range(3):
            assert world.max(number + rank) == number + 1

job()
sys.exit(3)
"""


def _port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def leave_starved(seconds: float = 90.0) -> list[int | None]:
    """Exit statuses of two ranks with starved workers; None for one that hung."""
    port = str(_port())
    ranks = [
        subprocess.Popen([sys.executable, "-c", _RANK, str(rank), port], stderr=subprocess.DEVNULL)
        for rank in range(2)
    ]
    end, codes = time.monotonic() + seconds, list[int | None]()
    for process in ranks:
        try:
            codes.append(process.wait(max(0.0, end - time.monotonic())))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            codes.append(None)
    return codes


@pytest.mark.dist
def test_starved_workers_neither_hang_nor_abort_their_rank() -> None:
    for _ in range(3):  # without the wait three of four end in an abort
        assert leave_starved() == [3, 3]


@pytest.mark.parametrize(
    "ending, left",
    [(None, True), (SystemExit(143), True), (ValueError(), False), (KeyboardInterrupt(), False)],
)
def test_a_rank_waits_whatever_ended_its_work_and_then_leaves(
    monkeypatch: pytest.MonkeyPatch, ending: BaseException | None, left: bool
) -> None:
    events: list[str] = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(world.dist, "init_process_group", lambda *args, **options: events.append("join"))
    monkeypatch.setattr(world, "wait_for_workers", lambda: events.append("wait"))
    monkeypatch.setattr(world.dist, "destroy_process_group", lambda: events.append("leave"))
    try:
        with world.start_world("cpu"):
            events.append("work")
            if ending is not None:
                raise ending
    except BaseException as raised:
        assert raised is ending
    assert events == ["join", "work", "wait", *(["leave"] if left else [])]


@contextmanager
def _worker(work: Callable[[], None]) -> Iterator[None]:
    """A thread of this process that looks like one of gloo's while it does `work`."""
    named, over = threading.Event(), threading.Event()

    def run() -> None:
        Path(f"/proc/self/task/{threading.get_native_id()}/comm").write_text("pt_gloo_runloop")
        named.set()
        work()
        over.wait()  # as one without work: asleep without a time limit

    thread = threading.Thread(target=run)
    thread.start()
    named.wait()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _seconds_waited(work: Callable[[], None]) -> float:
    start = time.monotonic()
    with _worker(work):
        assert wait_for_workers(limit=60.0)
        return time.monotonic() - start


def _compute(seconds: float) -> None:
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def _wake_often(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.004)  # as one that waits for the interpreter's lock


def test_no_worker_costs_one_look() -> None:
    assert wait_for_workers(limit=0.0)


def test_one_at_rest_is_not_waited_for() -> None:
    assert _seconds_waited(lambda: None) < 30.0


@pytest.mark.parametrize("work", [_compute, _wake_often])
def test_one_that_runs_or_keeps_asking_for_the_lock_is_waited_for(work: Callable[[float], None]) -> None:
    assert _seconds_waited(lambda: work(0.5)) > 0.4


def test_the_wait_has_an_end() -> None:
    enough = threading.Event()

    def spin() -> None:
        while not enough.is_set():
            pass

    with _worker(spin):
        rested = wait_for_workers(limit=0.1)
        enough.set()
    assert not rested


def test_gloo_names_its_workers_as_expected() -> None:
    group = dist.ProcessGroupGloo(dist.HashStore(), 0, 1)

    def names() -> list[str]:
        return [(thread / "comm").read_text().strip() for thread in Path("/proc/self/task").iterdir()]

    wait_for(lambda: "pt_gloo_runloop" in names())  # each takes its name when it first runs
    del group
