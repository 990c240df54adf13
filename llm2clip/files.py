"""Writing files so that a reader never sees half of one.

Everything the package writes goes through `atomic_path`: the data is written beside its final name,
synced to disk and renamed. A process killed at any instant leaves either the old file or the new one.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llm2clip.errors import UserError

TMP_SUFFIX = ".partial"
# of Linux's fcntl.h and fs.h
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextlib.contextmanager
def disk_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn "no space left" and "read-only" into one clear error that names the place."""
    try:
        yield
    except Exception as error:
        cause = _os_error(error)
        if cause in (errno.ENOSPC, errno.EDQUOT):
            where = os.path.dirname(os.path.abspath(path))
            free = shutil.disk_usage(where).free >> 20 if os.path.isdir(where) else 0
            raise UserError(
                f"no space left on disk while writing {os.fspath(path)} ({free} MiB free). "
                "What was complete before is intact; free some space and run the same command again."
            ) from error
        if cause in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise UserError(
                f"cannot write {os.fspath(path)}: {os.strerror(cause)}. Choose a writable directory."
            ) from error
        if cause in (errno.ENOTDIR, errno.EEXIST) and not isinstance(error, UserError):
            raise UserError(
                f"cannot write {os.fspath(path)}: a part of this path is a file, not a directory. Choose another path."
            ) from error
        raise


def make_directory(path: str | os.PathLike[str]) -> None:
    """Make a directory and those above it, where they are missing."""
    with disk_errors(path):
        os.makedirs(path, exist_ok=True)


@contextlib.contextmanager
def temporary_directory() -> Iterator[Path]:
    """A directory among the machine's temporary files, removed at the end."""
    with disk_errors(os.path.join(tempfile.gettempdir(), "llm2clip")):
        made = tempfile.TemporaryDirectory(prefix="llm2clip-")
    with made as name:
        yield Path(name)


def _os_error(error: BaseException | None) -> int | None:
    """The errno behind an exception; torch and safetensors hide it in a context or in the text."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen and not isinstance(error, UserError):
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno
        if found := re.search(r"\(os error (\d+)\)", str(error)):
            return int(found[1])
        error = error.__cause__ or error.__context__
    return None


def fsync_directory(path: str | os.PathLike[str]) -> None:
    """Make a rename inside `path` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is synced and renamed to `path`.

    On an exception the temporary file is removed and `path` is untouched. `path` may also name a
    directory to be created: make and fill the yielded path; an existing directory is replaced. What a killed
    process left half-written beside `path` is removed.

    Raises:
        UserError: no space is left, or the place cannot be written; `path` is untouched.
    """
    final = Path(path)
    tmp = final.with_name(f"{final.name}{TMP_SUFFIX}.{os.getpid()}")
    with disk_errors(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        _remove_left_over(final)
        try:
            yield tmp
            if tmp.is_dir():
                _sync_tree(tmp)
                _replace_directory(tmp, final)
            else:
                with open(tmp, "rb") as handle:
                    os.fsync(handle.fileno())
                os.replace(tmp, final)
            fsync_directory(final.parent)
        finally:
            _remove(tmp)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _remove_left_over(final: Path) -> None:
    prefix = f"{final.name}{TMP_SUFFIX}."
    for name in os.listdir(final.parent):
        if name.startswith(prefix) and name[len(prefix) :].isdigit():
            process = int(name[len(prefix) :])
            # a restarted container gives the same number again: what has our own is a leftover too
            if process == os.getpid() or not _is_running(process):
                _remove(final.parent / name)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


def _sync_tree(root: Path) -> None:
    for directory, _, names in os.walk(root):
        for name in names:
            with open(os.path.join(directory, name), "rb") as handle:
                os.fsync(handle.fileno())
        fsync_directory(directory)


def _replace_directory(tmp: Path, final: Path) -> None:
    if final.exists() and _exchanged(tmp, final):
        return  # the old one has the temporary name now, and is removed with it
    # rename cannot replace a directory that has files: move the old one aside first, so that at every
    # instant one complete copy exists under a name this module knows
    old = final.with_name(final.name + ".old")
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(final, old)
    os.rename(tmp, final)
    shutil.rmtree(old, ignore_errors=True)


def _exchanged(one: Path, other: Path) -> bool:
    """Swap two names in one instant; False where the system or the file system cannot."""
    swap = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if swap is None:
        return False
    result: int = swap(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)
    return result == 0


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` (UTF-8) atomically."""
    with atomic_path(path) as tmp:
        tmp.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as indented JSON atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, sort_keys=False) + "\n")


def read_json(path: str | os.PathLike[str], error: type[UserError] = UserError) -> Any:
    """Read a JSON file; raise `error` with the place of the damage when it is not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise error(f"{os.fspath(path)} does not exist") from None
    except OSError as problem:
        raise error(f"{os.fspath(path)} cannot be read: {problem.strerror}") from None
    except (ValueError, RecursionError) as problem:  # not text, not JSON, numbers too long, nested too deep
        raise error(
            f"{os.fspath(path)} is not valid JSON ({problem}); it is damaged or half-copied"
        ) from None


def require_regular(path: str | os.PathLike[str]) -> int:
    """Size in bytes of a regular file; pipes and devices, whose reading may never end, are refused.

    Raises:
        OSError: there is none, or it is something else.
    """
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))
    return found.st_size


def file_state(path: str | os.PathLike[str]) -> str:
    """Size and time of change of a file, which differ once it was replaced; `missing` where there is none."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return "missing"
    return f"{found.st_size} {found.st_mtime_ns}"


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Hexadecimal SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
