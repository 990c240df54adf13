"""Wait until gloo's worker threads have let go of the tensors of collectives that are over.

A collective returns to its caller before the worker that ran it drops its tensors, for which the worker needs Python's
lock. Whoever takes the group down while holding that lock, as the reducer of a DistributedDataParallel does when it is
freed, waits for the worker for ever; an interpreter that ends meanwhile aborts ("terminate called without an active
exception"). Seen with torch 2.13 where the cores are busy; pytorch/pytorch#56297 and #179291 describe both.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

_NAME = "pt_gloo_runloop"  # torch's name of these threads
_THREADS = Path("/proc/self/task")


def wait_for_workers(limit: float = 10.0) -> bool:
    """Sleep until no gloo worker of this process runs or waits for Python's lock.

    Args:
        limit: seconds to wait at most.

    Returns:
        Whether they are at rest; without Linux's list of threads, True after a short sleep.

    A worker inside a collective that another rank has not joined is at rest, too: it holds what it needs.
    """
    # who waits for the lock wakes once per switch interval, to ask for it: its switches go on counting
    pause = max(0.02, 4 * sys.getswitchinterval())
    end = time.monotonic() + limit
    before = _workers()
    while True:
        time.sleep(pause)  # the lock is free for those who wait for it
        now = _workers()
        if now == before and all(state not in ("R", "D") for state, _ in now.values()):
            return True
        if time.monotonic() > end:
            return False
        before = now


def _workers() -> dict[str, tuple[str, str]]:
    """State and number of voluntary context switches of each worker, by thread id."""
    found: dict[str, tuple[str, str]] = {}
    for thread in _THREADS.iterdir() if _THREADS.is_dir() else ():
        try:
            text = (thread / "status").read_text(encoding="utf-8", errors="replace")
        except OSError:  # it has ended
            continue
        fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
        if fields.get("Name", "").strip() == _NAME:
            # systems that imitate Linux may leave lines out: then only the state counts
            state, switches = (fields.get(key, "").strip() for key in ("State", "voluntary_ctxt_switches"))
            found[thread.name] = (state[:1], switches)
    return found
