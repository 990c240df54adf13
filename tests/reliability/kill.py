"""Kills commands at random instants, lets them go on, and compares the end with an undisturbed run.

    python -m tests.reliability.kill --kills 200 --out kills.json

Each command runs on tiny models and data. An attempt: start it, `kill -9` its process group at an instant drawn
uniformly from an undisturbed run's duration, start it again, kill it again, up to three times; then let it end and
compare every file (checkpoints, metrics, shards, reports) or every row (stores) with the undisturbed run. After each
kill what is on disk must be whole.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from llm2clip.files import write_json
from tests.reliability import evidence
from tests.reliability.forks import run, start
from tests.reliability.scenarios import NAMES, Facts, Scenario, build

_CHAIN = 3  # kills of one attempt at most


@dataclass
class Tally:
    """What happened to one command.

    Attributes:
        seconds: of an undisturbed run.
        kills: processes that were running when they were killed.
        attempts: runs that were killed at least once, brought to their end and compared.
        survived: kills of attempts whose end equals the undisturbed run.
        failures: what went wrong otherwise, in words.
        instants: seconds from the start of each killed process.
    """

    seconds: float = 0.0
    kills: int = 0
    attempts: int = 0
    survived: int = 0
    failures: list[str] = field(default_factory=list)
    instants: list[float] = field(default_factory=list)


class Killer:
    """Attacks one command.

    Args:
        scenario: the command.
        logs: directory for what its processes write.
        rng: draws the instants.
    """

    def __init__(self, scenario: Scenario, logs: Path, rng: random.Random) -> None:
        self.scenario, self.tally = scenario, Tally()
        self._log, self._rng = logs / f"{scenario.name}.log", rng
        self._facts, self.tally.seconds = self._undisturbed()

    def _undisturbed(self) -> tuple[Facts, float]:
        begin = time.monotonic()
        self._clear()
        self._finish()
        seconds = time.monotonic() - begin
        facts = self.scenario.facts(self.scenario.out)
        assert facts, f"{self.scenario.name} left nothing to compare"
        return facts, round(seconds, 3)

    def attempt(self, most: int) -> int:
        """One attempt with up to `most` kills; returns how many there were."""
        self._clear()
        kills = 0
        try:
            for _ in range(self._rng.randint(1, min(most, _CHAIN))):
                child = start(self.scenario.work, self._log)
                begin = time.monotonic()
                if not child.wait_until(begin + self._rng.uniform(0.0, self.tally.seconds)):
                    assert child.code == 0, f"exit status {child.code}: {child.shown()[-2000:]}"
                    break
                self.tally.instants.append(round(time.monotonic() - begin, 3))
                child.kill()
                kills += 1
                self.scenario.check(self.scenario.out)
            if kills:
                self._finish()
                self._compare()
                self.tally.survived += kills
        except Exception as problem:
            self.tally.failures.append(
                f"after kills at {self.tally.instants[-kills:]} s: "
                + "".join(traceback.format_exception_only(problem)).strip()
            )
        self.tally.kills += kills
        self.tally.attempts += kills > 0
        return kills

    def _finish(self) -> None:
        child = run(self.scenario.work, self._log)
        assert child.code == 0, f"exit status {child.code}: {child.shown()[-2000:]}"

    def _compare(self) -> None:
        found = self.scenario.facts(self.scenario.out)
        different = evidence.differences(found, self._facts)
        assert not different, f"differs from the undisturbed run: {', '.join(different[:10])}"

    def _clear(self) -> None:
        shutil.rmtree(self.scenario.out, ignore_errors=True)


def campaign(root: Path, kills: int, *, seed: int = 0, names: Sequence[str] = NAMES) -> dict[str, Tally]:
    """Kill the named commands in turn until each had its share of `kills`.

    Args:
        root: directory for models, data and outputs.
        kills: kills over all commands.
        seed: of the instants.
        names: commands to attack.
    """
    scenarios = build(root)
    rng = random.Random(seed)
    killers = [Killer(scenarios[name], root, rng) for name in names]
    done = 0
    while done < kills:
        killer = min(killers, key=lambda one: one.tally.kills)
        done += killer.attempt(kills - done)
        print(f"{done} of {kills} kills ({killer.scenario.name})", file=sys.stderr)
    return {killer.scenario.name: killer.tally for killer in killers}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a campaign and write its result; 1 when a kill was not survived."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="kills over all commands (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the instants (%(default)s)")
    parser.add_argument("--command", action="append", choices=NAMES, help="attack only this one; repeatable")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    args = parser.parse_args(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="llm2clip-kill-") as root:
        tallies = campaign(Path(root), args.kills, seed=args.seed, names=args.command or NAMES)
    result = {
        "kills": sum(tally.kills for tally in tallies.values()),
        "survived": sum(tally.survived for tally in tallies.values()),
        "seed": args.seed,
        "seconds": round(time.monotonic() - begin, 1),
        "commands": {name: asdict(tally) for name, tally in tallies.items()},
    }
    if args.out:
        write_json(args.out, result)
    shown = {name: f"{tally.survived} of {tally.kills}" for name, tally in tallies.items()}
    print(json.dumps({"survived": f"{result['survived']} of {result['kills']}", **shown}, indent=2))
    for name, tally in tallies.items():
        for failure in tally.failures:
            print(f"{name}: {failure}")
    return 0 if result["survived"] == result["kills"] else 1


if __name__ == "__main__":
    sys.exit(main())
