"""Single files of installed packages, where the package as a whole does not load beside today's transformers."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest


def _folder(package: str, reason: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(reason)
    return Path(next(iter(spec.submodule_search_locations)))


def host_file(package: str, file: str, reason: str) -> Any:
    """A file of a package as a module of its own, without the package's `__init__`; skips where it is not installed."""
    path = _folder(package, reason) / file
    spec = importlib.util.spec_from_file_location(f"host_{package}_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def host_package(package: str, inner: str, reason: str) -> Any:
    """A subpackage as a package of its own, without the outer `__init__`; skips where it is not installed."""
    name = f"host_{package}_{inner}"
    if name not in sys.modules:
        folder = _folder(package, reason) / inner
        spec = importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]
