"""Getting the files of a Debian package without installing it and without root."""

from __future__ import annotations

import io
import os
import posixpath
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

from llm2clip.errors import DataError
from llm2clip.files import disk_errors, make_directory

AR_MAGIC = b"!<arch>\n"


def download_package(name: str, directory: Path) -> Path:
    """Download the package's .deb into `directory` with `apt-get download`.

    Raises:
        DataError: there is no apt client, or it cannot download; the message names what to do instead.
    """
    instead = (
        f"Get the file {name}_*.deb on another machine (`apt-get download {name}`) and pass it with "
        "--package FILE.deb, or train on your own images (docs/own-data.md)."
    )
    client = shutil.which("apt-get")
    if client is None:
        raise DataError(
            f"the Debian package {name} is needed, but this machine has no apt client (apt-get). {instead}"
        )
    print(f"downloading the Debian package {name}", file=sys.stderr, flush=True)
    result = subprocess.run(
        [client, "download", name],
        cwd=directory,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    found = sorted(directory.glob(f"{name}_*.deb"))
    if result.returncode == 0 and found:
        return found[-1]
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    reason = lines[-1].strip() if lines else f"exit status {result.returncode}"
    raise DataError(
        f"`apt-get download {name}` failed: {reason}. If the package lists are old or empty, run "
        f"`sudo apt-get update` once and try again. {instead}"
    )


def unpack_package(package: Path, target: Path, keep: Callable[[str], bool]) -> int:
    """Write the regular files of a .deb for whose path `keep` is true below `target`; return their number.

    A .deb is an ar archive with a tar of the files inside; both are read here, so dpkg is not needed.

    Raises:
        DataError: the file is missing, is not a Debian package, or is cut short.
    """
    if not package.is_file():
        raise DataError(f"{package} does not exist; --package expects the path of a .deb file")
    count = 0
    try:
        with open(package, "rb") as handle, _open_data(handle, package) as tar:
            for member in tar:
                path = posixpath.normpath(member.name)
                # links are left out as well: only plain files that stay below `target`
                if not member.isreg() or path.startswith(("/", "..")) or not keep(path):
                    continue
                content = tar.extractfile(member)
                assert content is not None
                destination = target / path
                make_directory(destination.parent)
                with disk_errors(destination), content, open(destination, "wb") as out:
                    shutil.copyfileobj(content, out)
                count += 1
    except (tarfile.TarError, EOFError, OSError) as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise
        raise DataError(f"{package} is damaged or cut short ({error}); download it again") from error
    except Exception as error:
        # lzma's error class exists only where Python was built with lzma
        if type(error).__name__ not in ("LZMAError", "ZstdError"):
            raise
        raise DataError(f"{package} is damaged or cut short ({error}); download it again") from error
    return count


def _open_data(handle: IO[bytes], package: Path) -> tarfile.TarFile:
    if handle.read(len(AR_MAGIC)) != AR_MAGIC:
        raise DataError(
            f"{package} is not a Debian package (it does not begin with {AR_MAGIC.decode().strip()!r})"
        )
    while header := handle.read(60):
        name = header[:16].decode("ascii", "replace").strip().rstrip("/")
        digits = header[48:58].strip()
        if len(header) < 60 or not digits.isdigit():
            break
        size = int(digits)
        if name.startswith("data.tar"):
            return _open_tar(handle.read(size), name, package)
        # members begin at even offsets
        handle.seek(size + size % 2, os.SEEK_CUR)
    raise DataError(f"{package} has no data.tar inside; it is damaged or cut short, download it again")


def _open_tar(data: bytes, name: str, package: Path) -> tarfile.TarFile:
    if name.endswith(".zst") and sys.version_info < (3, 14):
        program = shutil.which("zstd") or shutil.which("unzstd")
        if program is None:
            raise DataError(
                f"{package} is compressed with zstd, which this Python cannot read and for which no `zstd` "
                "program was found; install zstd, or use the package of a Debian release (compressed with xz)"
            )
        result = subprocess.run([program, "-dc"], input=data, capture_output=True, check=False)
        if result.returncode != 0:
            raise DataError(f"{package} is damaged or cut short (zstd cannot read it); download it again")
        data = result.stdout
    return tarfile.open(fileobj=io.BytesIO(data), mode="r:*")
