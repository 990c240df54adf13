"""Every command survives `kill -9`; `python -m tests.reliability.kill` does the same for as long as one likes."""

from __future__ import annotations

from pathlib import Path

from tests.reliability.kill import campaign
from tests.reliability.scenarios import NAMES, Scenario


def test_twenty_kills(scenarios: dict[str, Scenario], tmp_path: Path) -> None:
    tallies = campaign(scenarios, tmp_path, kills=len(NAMES), changes=20 - len(NAMES))
    assert [failure for tally in tallies.values() for failure in tally.failures] == []
    assert sum(tally.survived for tally in tallies.values()) == 20
    assert all(tally.kills for tally in tallies.values())
