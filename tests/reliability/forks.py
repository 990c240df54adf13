"""A fork server: commands run in children of a process that has imported everything, so that a start costs nothing.

Importing torch and transformers takes seconds, the tiny commands of these tests a fraction of one. A child is a process
group of its own, as a shell gives to a job: a signal to the group reaches its data-loading workers too.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Prepare = Callable[[], None]


@dataclass
class Child:
    """A command under way.

    Attributes:
        pid: of the process and of its group.
        log: what it wrote to standard output and standard error.
        code: exit status, negative for a signal; None while it runs.
    """

    pid: int
    log: Path
    code: int | None = None

    def alive(self) -> bool:
        """Whether it still runs."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code is None

    def wait(self, seconds: float = 120.0) -> int:
        """Its exit status; kills it and fails when it takes longer than `seconds`."""
        end = time.monotonic() + seconds
        while self.alive():
            if time.monotonic() > end:
                self.kill()
                raise AssertionError(f"did not end within {seconds} s:\n{self.shown()}")
            time.sleep(0.002)
        assert self.code is not None
        return self.code

    def wait_until(self, moment: float) -> bool:
        """Wait until a moment of `time.monotonic`; True when it still runs then."""
        while self.alive() and (left := moment - time.monotonic()) > 0:
            time.sleep(min(left, 0.002))
        return self.alive()

    def catches(self, number: int) -> bool:
        """Whether it has a handler for a signal; while it runs, on Linux."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
        return bool(int(caught.split()[1], 16) >> (number - 1) & 1)

    def signal(self, number: int) -> None:
        """Send a signal to the whole group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def kill(self) -> int:
        """`kill -9` the whole group; its exit status."""
        self.signal(signal.SIGKILL)
        return self.wait()

    def shown(self) -> str:
        """What it has written so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")


def start(work: Callable[[], int], log: Path, prepare: Prepare | None = None) -> Child:
    """Start `work` in a child; its return value becomes the exit status.

    Args:
        work: what to do, for example `lambda: main(["embed", ...])`.
        log: file for its output; begun anew.
        prepare: called in the child before.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    begun, ready = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        os.write(ready, b"!")
        _run(work, log, prepare)
    os.close(ready)
    os.read(begun, 1)  # the group exists before anyone signals it
    os.close(begun)
    return Child(pid, log)


def _run(work: Callable[[], int], log: Path, prepare: Prepare | None) -> None:
    """The child's life; never returns, so that nothing of the parent (pytest, its fixtures) is run twice."""
    code = 1
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout = os.fdopen(1, "w", closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        # pytest's own handlers hold on to streams of the parent
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        torch.set_num_threads(1)
        if prepare is not None:
            prepare()
        code = work()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def during(owner: type, method: str, call: int, act: Callable[[], None]) -> Prepare:
    """In the child: `act` at the beginning of the n-th call (from 0) of a method."""

    def prepare() -> None:
        original, calls = getattr(owner, method), iter(range(1 << 62))

        def watched(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == call:
                act()
            return original(*args, **kwargs)

        setattr(owner, method, watched)

    return prepare


def to_group(number: int) -> Callable[[], None]:
    """What sends a signal to the whole group of the process that calls it."""
    return lambda: os.killpg(os.getpgid(0), number)


def run(work: Callable[[], int], log: Path, prepare: Prepare | None = None) -> Child:
    """`start`, and wait for the end."""
    child = start(work, log, prepare)
    child.wait()
    return child


def run_first(work: Callable[[], int], log: Path) -> Child:
    """`run`, and import here what the work has imported: later children find it in memory.

    The work itself never runs in this process, which must not have threads when it forks.
    """
    names = log.with_suffix(".modules")

    def once() -> int:
        code = work()
        names.write_text(json.dumps([name for name in sys.modules if name != "__main__"]))
        return code

    child = run(once, log)
    assert child.code == 0, child.shown()
    for name in json.loads(names.read_text()):
        if name not in sys.modules:
            # some modules exist only under the condition that the command has met
            with contextlib.suppress(Exception):
                importlib.import_module(name)
    return child
