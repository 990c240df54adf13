"""The attacked commands, built once for each process of the test run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.reliability.scenarios import Scenario, build


@pytest.hookimpl(tryfirst=True)  # before xdist looks for the mark
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep these tests in one process of `pytest -n 2 --dist loadgroup`, so that they share what was built."""
    for item in items:
        if "scenarios" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("reliability"))


@pytest.fixture(scope="package")
def scenarios(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Scenario]:
    return build(tmp_path_factory.mktemp("reliability"))


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """File for the output of a child."""
    return tmp_path / "child.log"
