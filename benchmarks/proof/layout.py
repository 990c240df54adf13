"""Where the proof's own build of the library lies, and whether it is still that of the sources at hand."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# the package beside the library of the section `build`; the sections after it run with it
BUILT = ROOT / "build" / "gpu_proof" / "kernels"


def digest() -> str:
    """Returns a digest of everything that the native library is made from."""
    found = hashlib.sha256()
    for path in sorted([ROOT / "CMakeLists.txt", *(p for p in (ROOT / "csrc").rglob("*") if p.is_file())]):
        found.update(path.relative_to(ROOT).as_posix().encode())
        found.update(path.read_bytes())
    return found.hexdigest()


def copy_package() -> Path:
    """Copies the package without its library to BUILT, where a build puts another; returns the package's folder."""
    package = BUILT / "llm2clip_kernels"
    shutil.copytree(
        ROOT / "kernels" / "llm2clip_kernels",
        package,
        ignore=shutil.ignore_patterns("*.so", "__pycache__", "build_record.json"),
        dirs_exist_ok=True,
    )
    return package


def mark_built() -> None:
    """Notes which sources the library at BUILT was made from."""
    (BUILT / "sources").write_text(digest())


def refresh() -> bool:
    """Keeps an earlier build if its sources are those at hand, with today's Python files; else removes it.

    Returns:
        Whether there is a build to use.
    """
    mark = BUILT / "sources"
    if not mark.exists() or mark.read_text() != digest():
        shutil.rmtree(BUILT, ignore_errors=True)
        return False
    library = BUILT / "llm2clip_kernels" / "_C.so"
    for path in (BUILT / "llm2clip_kernels").rglob("*.py"):
        path.unlink()
    copy_package()
    return library.exists()


def python_path(section: str) -> str:
    """Returns PYTHONPATH of a section's process: the library just built, except where the shipped one is proven."""
    first = [BUILT] if (BUILT / "sources").exists() and section not in ("library", "build") else []
    return os.pathsep.join(str(path) for path in [*first, ROOT / "kernels", ROOT])
