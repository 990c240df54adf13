"""The attacked commands, built once for each process of the test run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.reliability.scenarios import Scenario, build


@pytest.fixture(scope="package")
def scenarios(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Scenario]:
    return build(tmp_path_factory.mktemp("reliability"))


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """File for the output of a child."""
    return tmp_path / "child.log"
