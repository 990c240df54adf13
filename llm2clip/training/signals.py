"""Requests to stop that come as signals: the step is finished, or what was begun cleaned up; a second ends at once."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# SIGUSR1 is what schedulers send ahead of a time limit (`sbatch --signal=USR1@120`): the job ends as a success
HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@contextmanager
def stop_requested() -> Iterator[Callable[[], int]]:
    """A function that gives the largest number of the handled signals that came, else 0.

    The second signal of a kind has its usual effect: it ends the process.
    """
    received: list[int] = []

    def remember(number: int, frame: Any) -> None:
        received.append(number)
        signal.signal(number, signal.SIG_DFL)

    try:
        previous = {number: signal.signal(number, remember) for number in HANDLED}
    except ValueError:  # not the main thread: signals are somebody else's
        yield lambda: 0
        return
    try:
        yield lambda: max(received, default=0)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def unwound() -> Iterator[None]:
    """SIGTERM and SIGUSR1 leave the block as SystemExit, so that half-written files and temporary ones are removed.

    For commands, and phases of them, that have no step to finish. The second signal of a kind ends the process.
    """

    def leave(number: int, frame: Any) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise SystemExit(exit_status(number))

    try:
        previous = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGUSR1)}
    except ValueError:  # not the main thread: signals are somebody else's
        yield
        return
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def exit_status(number: int) -> int:
    """What a process that was asked to stop by this signal exits with: 0 after SIGUSR1, else 128 + number."""
    return 0 if number == signal.SIGUSR1 else 128 + number
