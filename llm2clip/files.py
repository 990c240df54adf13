"""Writing files so that a reader never sees half of one.

Everything the package writes goes through `atomic_path`: the data is written beside its final name,
synced to disk and renamed. A process killed at any instant leaves either the old file or the new one.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llm2clip.errors import UserError

TMP_SUFFIX = ".partial"


@contextlib.contextmanager
def disk_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn "no space left" and "read-only" into one clear error that names the place."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            where = os.path.dirname(os.path.abspath(path))
            free = shutil.disk_usage(where).free >> 20 if os.path.isdir(where) else 0
            raise UserError(
                f"no space left on disk while writing {os.fspath(path)} ({free} MiB free). "
                "What was complete before is intact; free some space and run the same command again."
            ) from error
        if error.errno in (errno.EROFS, errno.EACCES):
            raise UserError(
                f"cannot write {os.fspath(path)}: {error.strerror}. Choose a writable directory."
            ) from error
        raise


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
    directory to be created: make and fill the yielded path; an existing directory is replaced.
    """
    final = Path(path)
    tmp = final.with_name(f"{final.name}{TMP_SUFFIX}.{os.getpid()}")
    with disk_errors(final):
        final.parent.mkdir(parents=True, exist_ok=True)
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
            if tmp.is_dir():
                shutil.rmtree(tmp, ignore_errors=True)
            else:
                tmp.unlink(missing_ok=True)


def _sync_tree(root: Path) -> None:
    for directory, _, names in os.walk(root):
        for name in names:
            with open(os.path.join(directory, name), "rb") as handle:
                os.fsync(handle.fileno())
        fsync_directory(directory)


def _replace_directory(tmp: Path, final: Path) -> None:
    # rename cannot replace a directory that has files: move the old one aside first, so that at every
    # instant one complete copy exists under a name this module knows
    old = final.with_name(final.name + ".old")
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(final, old)
    os.rename(tmp, final)
    shutil.rmtree(old, ignore_errors=True)


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
    except (UnicodeDecodeError, json.JSONDecodeError) as problem:
        raise error(
            f"{os.fspath(path)} is not valid JSON ({problem}); it is damaged or half-copied"
        ) from None


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Hexadecimal SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
