"""Fills the disk at every place where commands write, lets them go on, and compares the end with an undisturbed run.

    python -m tests.reliability.full_disk --out full_disk.json

From the n-th change of a file on, everything that needs space fails, for every n of the undisturbed run. The command
must end with one error that names a file, leave the last good state whole and nothing half-written, and go on when
there is space again.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llm2clip.files import write_json
from tests.reliability import evidence
from tests.reliability.faults import at_each_change, full_from, needs_space, record
from tests.reliability.forks import run
from tests.reliability.scenarios import NAMES, Facts, Scenario, build


@dataclass(frozen=True)
class Undisturbed:
    """A run that nothing happened to.

    Attributes:
        facts: what it left.
        changes: changes of files that it made, in order.
        seconds: how long it took.
    """

    facts: Facts
    changes: tuple[str, ...]
    seconds: float


@functools.cache
def undisturbed(scenario: Scenario) -> Undisturbed:
    """Run a command once from the start; the same answer for ever after, as every run leaves the same."""
    log = scenario.out.parent.with_name(f"{scenario.name}.log")

    def work() -> int:
        changes: list[str] = []
        at_each_change(scenario.out.parent, record(changes))
        code = scenario.work()
        log.with_suffix(".changes").write_text("\n".join(changes))
        return code

    scenario.clear()
    begin = time.monotonic()
    child = run(work, log)
    seconds = time.monotonic() - begin
    assert child.code == 0, child.shown()
    found = Undisturbed(
        scenario.facts(scenario.out), tuple(log.with_suffix(".changes").read_text().splitlines()), seconds
    )
    assert found.facts and found.changes
    return found


def places(scenario: Scenario) -> list[str]:
    """Changes of an undisturbed run that need space."""
    return [change for change in undisturbed(scenario).changes if needs_space(change)]


def refused(shown: str) -> None:
    """One error that names a file and what to do, and no traceback."""
    errors = [line for line in shown.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in shown, shown
    named = re.search(r"no space left on disk while writing \S*/out/\S+ \(\d+ MiB free\)", errors[0])
    assert named and "run the same command again" in errors[0], shown


def fill(scenario: Scenario, log: Path, number: int) -> None:
    """Fail from the n-th change that needs space on, then go on."""
    undisturbed(scenario)
    scenario.clear()
    child = run(scenario.work, log, lambda: at_each_change(scenario.out.parent, full_from(number)))
    assert child.code == 2, child.shown()
    refused(child.shown())
    goes_on(scenario, log)


def goes_on(scenario: Scenario, log: Path) -> None:
    """What a refused command left is whole, and the command comes to the same end."""
    scenario.check(scenario.out)
    assert not evidence.left_over(scenario.out.parent)
    child = run(scenario.work, log)
    assert child.code == 0, child.shown()
    assert evidence.differences(scenario.facts(scenario.out), undisturbed(scenario).facts) == []


def main(argv: Sequence[str] | None = None) -> int:
    """Fill the disk at every place and write the result; 1 when one was not survived."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--command", action="append", choices=NAMES, help="attack only this one; repeatable")
    parser.add_argument("--places", type=int, help="at most so many of each command, spread evenly; else all")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    args = parser.parse_args(argv)
    begin, failures, counts = time.monotonic(), [], {}
    with tempfile.TemporaryDirectory(prefix="llm2clip-full-") as folder:
        root = Path(folder)
        scenarios, log = build(root), root / "child.log"
        for name in args.command or NAMES:
            found = list(enumerate(places(scenarios[name])))
            tried = min(args.places or len(found), len(found))
            counts[name] = {"places": len(found), "tried": tried, "survived": 0}
            for number, change in (found[n * len(found) // tried] for n in range(tried)):
                try:
                    fill(scenarios[name], log, number)
                    counts[name]["survived"] += 1
                except Exception as problem:
                    said = "".join(traceback.format_exception_only(problem)).strip()
                    failures.append(f"{name}, full from change {number} on ({change}): {said}")
            print(f"{name}: {counts[name]}", file=sys.stderr)
    result = {
        "tried": sum(count["tried"] for count in counts.values()),
        "survived": sum(count["survived"] for count in counts.values()),
        "seconds": round(time.monotonic() - begin, 1),
        "commands": counts,
        "failures": failures,
    }
    if args.out:
        write_json(args.out, result)
    print(json.dumps(result, indent=2))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
