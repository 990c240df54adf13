"""Something happens at the n-th change of the file system that a process makes below a directory.

Python announces file operations to audit hooks (PEP 578) before it does them, whoever asks: our code, torch, peft. What
native code writes by itself (safetensors) is not announced; a small file system makes that fail (`test_disk_full`).
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_CHANGES = {"os.rename", "os.link", "os.mkdir", "os.remove", "os.rmdir", "os.truncate"}
# what a full disk does not forbid
_FREEING = {"os.remove", "os.rmdir", "os.truncate"}

# name of the operation, its path
Act = Callable[[str, str], None]


def at_each_change(root: Path, act: Act) -> None:
    """Call `act` before each change below `root` that this process makes from now on; it cannot be undone.

    Only for a process of its own: a child of the fork server.
    """
    owner, place = os.getpid(), os.path.abspath(root)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and not (isinstance(args[2], int) and args[2] & _WRITING):
            return
        if event != "open" and event not in _CHANGES:
            return
        # a rename changes the directory of its second path too, which is the one that has to be below `root`
        path = args[1] if event in ("os.rename", "os.link") else args[0]
        if os.getpid() == owner and isinstance(path, (str, bytes, os.PathLike)):
            _act(act, event, os.path.abspath(os.fsdecode(path)), place)

    sys.addaudithook(hook)
    sync = os.fsync

    def fsync(descriptor: int) -> None:
        if os.getpid() == owner:
            _act(act, "fsync", os.path.realpath(f"/proc/self/fd/{descriptor}"), place)
        sync(descriptor)

    os.fsync = fsync


def _act(act: Act, event: str, path: str, place: str) -> None:
    if path == place or path.startswith(place + os.sep):
        act(event, path)


def record(changes: list[str]) -> Act:
    """Remember each change as `operation path`."""

    def act(event: str, path: str) -> None:
        changes.append(f"{event} {path}")

    return act


def kill_at(number: int) -> Act:
    """`kill -9` the process group before change `number` (from 0)."""
    seen = iter(range(1 << 62))

    def act(event: str, path: str) -> None:
        if next(seen) == number:
            os.killpg(os.getpgid(0), signal.SIGKILL)

    return act


def full_from(number: int) -> Act:
    """From change `number` on (of those that need space, from 0) the disk is full."""
    seen = iter(range(1 << 62))

    def act(event: str, path: str) -> None:
        if event not in _FREEING and next(seen) >= number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    return act


def needs_space(change: str) -> bool:
    """Whether a recorded change is one that `full_from` counts."""
    return change.partition(" ")[0] not in _FREEING
