"""Kills commands at random instants, lets them go on, and compares the end with an undisturbed run.

    python -m tests.reliability.kill --kills 200 --out kills.json

Each command runs on tiny models and data. An attempt: start it, `kill -9` its process group at an instant drawn
uniformly from an undisturbed run's duration, start it again, kill it again, up to three times; then let it end and
compare every file (checkpoints, metrics, shards, reports) or every row (stores) with the undisturbed run. After each
kill what is on disk must be whole.

Tiny commands write for a small part of their time, so `--changes N` further kills come right before a change of a
file (creation, rename, sync, removal), spread evenly over all those of the undisturbed runs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from llm2clip.files import write_json
from tests.reliability import evidence
from tests.reliability.faults import at_each_change, kill_at
from tests.reliability.forks import run, start
from tests.reliability.full_disk import undisturbed
from tests.reliability.scenarios import NAMES, Scenario, build

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
        at_changes: kills right before a change of a file.
        instants: seconds from the start of each process that was killed at a random instant.
    """

    seconds: float = 0.0
    kills: int = 0
    attempts: int = 0
    survived: int = 0
    at_changes: int = 0
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
        self._whole = undisturbed(scenario)
        self.changes = self._whole.changes
        self.tally.seconds = round(self._whole.seconds, 3)

    def attempt(self, most: int) -> int:
        """One attempt with up to `most` kills at random instants; returns how many there were."""
        self.scenario.clear()
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
            self._failed(f"kills at {self.tally.instants[-kills:]} s", problem)
        self.tally.kills += kills
        self.tally.attempts += kills > 0
        return kills

    def attempt_at(self, change: int) -> None:
        """One kill right before a change of a file."""
        self.scenario.clear()
        try:
            child = run(
                self.scenario.work,
                self._log,
                lambda: at_each_change(self.scenario.out.parent, kill_at(change)),
            )
            assert child.code == -signal.SIGKILL, f"exit status {child.code}: {child.shown()[-2000:]}"
            self.scenario.check(self.scenario.out)
            self._finish()
            self._compare()
            self.tally.survived += 1
        except Exception as problem:
            self._failed(f"a kill before {self.changes[change]}", problem)
        self.tally.kills += 1
        self.tally.attempts += 1
        self.tally.at_changes += 1

    def _failed(self, after: str, problem: Exception) -> None:
        said = "".join(traceback.format_exception_only(problem)).strip()
        self.tally.failures.append(f"after {after}: {said}")

    def _finish(self) -> None:
        child = run(self.scenario.work, self._log)
        assert child.code == 0, f"exit status {child.code}: {child.shown()[-2000:]}"

    def _compare(self) -> None:
        found = self.scenario.facts(self.scenario.out)
        different = evidence.differences(found, self._whole.facts)
        assert not different, f"differs from the undisturbed run: {', '.join(different[:10])}"


def campaign(
    scenarios: Mapping[str, Scenario], root: Path, kills: int, changes: int, *, seed: int = 0
) -> dict[str, Tally]:
    """Kill the commands in turn until each had its share of `kills`.

    Args:
        scenarios: the commands.
        root: directory for logs.
        kills: kills at random instants over all commands.
        changes: kills right before changes of files over all commands.
        seed: of the instants.
    """
    rng = random.Random(seed)
    killers = [Killer(scenario, root, rng) for scenario in scenarios.values()]
    done = 0
    while done < kills:
        killer = min(killers, key=lambda one: one.tally.kills)
        done += killer.attempt(max(1, (kills - done) // len(killers)))
        print(f"{done} of {kills} kills ({killer.scenario.name})", file=sys.stderr)
    every = [(killer, change) for killer in killers for change in range(len(killer.changes))]
    for number in range(min(changes, len(every))):
        killer, change = every[number * len(every) // min(changes, len(every))]
        killer.attempt_at(change)
        print(f"{number + 1} of {changes} kills at changes ({killer.scenario.name})", file=sys.stderr)
    return {killer.scenario.name: killer.tally for killer in killers}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a campaign and write its result; 1 when a kill was not survived."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="kills over all commands (%(default)s)")
    parser.add_argument("--changes", type=int, default=0, help="further kills before changes (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the instants (%(default)s)")
    parser.add_argument("--command", action="append", choices=NAMES, help="attack only this one; repeatable")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    args = parser.parse_args(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="llm2clip-kill-") as folder:
        root = Path(folder)
        built = build(root)
        chosen = {name: built[name] for name in args.command or NAMES}
        tallies = campaign(chosen, root, args.kills, args.changes, seed=args.seed)
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
