"""What a piece of code does to the world, seen through Python's audit events."""

from __future__ import annotations

import os
import resource
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# changes of files and how many of their arguments are paths
_CHANGES = {
    "os.remove": 1, "os.rename": 2, "os.mkdir": 1, "os.rmdir": 1, "os.symlink": 2, "os.link": 2, "os.truncate": 1,
    "os.chmod": 1, "os.chown": 1, "shutil.rmtree": 1, "shutil.unpack_archive": 2,
}  # fmt: skip
_PROCESSES = (
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.startfile",
    "pty.spawn",
)
_NETWORK = ("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.sendto", "urllib.Request")
_CODE = ("pickle.find_class",)


@dataclass
class Seen:
    """What happened: one line each.

    Attributes:
        forbidden: writes outside the folder, processes, network beyond loopback, unpickled classes, imported files of
            the folder.
        bound: addresses that were listened on.
        grown_mib: by how much the process's largest memory grew.
    """

    folder: str
    forbidden: list[str] = field(default_factory=list)
    bound: list[str] = field(default_factory=list)
    grown_mib: float = 0.0


_active: list[Seen] = []


def _allowed(path: Any, folder: str) -> bool:
    if isinstance(path, int) or path is None:
        return True  # a descriptor that was opened before, and seen then
    real = os.path.realpath(os.fsdecode(path))
    return real == folder or real.startswith((folder + os.sep, "/dev/null", "/proc/self/"))


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    for seen in _active:
        if event == "open":
            path, mode, flags = arguments
            writes = (
                any(c in mode for c in "wxa+")
                if mode
                else bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
            )
            if writes and not _allowed(path, seen.folder):
                seen.forbidden.append(f"writes {path}")
        elif event in _CHANGES:
            for path in arguments[: _CHANGES[event]]:
                if not _allowed(path, seen.folder):
                    seen.forbidden.append(f"{event} {path}")
        elif event == "import":
            file = arguments[1]
            if isinstance(file, str) and os.path.realpath(file).startswith(seen.folder + os.sep):
                seen.forbidden.append(f"imports {file}")
        elif event in _NETWORK:
            text = repr(arguments[-1] if event != "socket.getaddrinfo" else arguments[0])
            if event == "socket.bind":
                seen.bound.append(text)
            if "127.0.0.1" not in text and "::1" not in text and "localhost" not in text:
                seen.forbidden.append(f"{event} {text}")
        elif event in _PROCESSES or event in _CODE:
            seen.forbidden.append(f"{event} {arguments!r:.200}")


def _largest_kib(anew: bool = False) -> int:
    """Largest resident memory of this process so far; `anew`: from now on."""
    try:
        if anew:
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0])
    except (OSError, IndexError):  # not Linux, or forbidden in this container
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@contextmanager
def watched(folder: Path) -> Iterator[Seen]:
    """Record what happens inside; only writes to `folder` are allowed, and it is the directory of temporary files."""
    if _hook not in _installed:
        sys.addaudithook(_hook)
        _installed.append(_hook)
    seen = Seen(os.path.realpath(folder))
    before, temporary = _largest_kib(anew=True), tempfile.tempdir
    # a module that is imported for the first time would leave its bytecode beside itself
    bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    tempfile.tempdir = seen.folder
    _active.append(seen)
    try:
        yield seen
    finally:
        _active.remove(seen)
        tempfile.tempdir, sys.dont_write_bytecode = temporary, bytecode
        seen.grown_mib = (_largest_kib() - before) / 1024


_installed: list[Any] = []  # a hook cannot be taken out again
