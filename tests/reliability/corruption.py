"""Run the named corruptions: `python -m tests.reliability.corruption --out FILE`.

A corruption is caught when reading ends in an error of `llm2clip.errors` whose message names the file and the place:
the rows, the member, the line, the byte or the field that is wrong.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm2clip.errors import UserError
from tests.reliability import artefacts

Damage = Callable[[Path], Any]
Read = Callable[[Path], Any]


@dataclass(frozen=True)
class Corruption:
    """One way to damage an artefact.

    Attributes:
        name: says what is damaged and how.
        artefact: directory of `artefacts.build_all`.
        damage: damages a copy of it.
        read: what must fail.
        file: regular expression of the damaged file in the message.
        place: of what the message says of the damage.
    """

    name: str
    artefact: str
    damage: Damage
    read: Read
    file: str
    place: str


def caught(corruption: Corruption, good: Path, place: Path) -> str:
    """Damage a copy and read it: the message of the error; "" where none came.

    What is raised is anything but an error of `llm2clip.errors`.
    """
    copy = artefacts.copied(good, corruption.artefact, place)
    corruption.damage(copy)
    try:
        corruption.read(copy)
    except UserError as error:
        return str(error)
    return ""


def is_named(corruption: Corruption, message: str) -> bool:
    """Whether a message says where the damage is."""
    return bool(re.search(corruption.file, message) and re.search(corruption.place, message, re.DOTALL))


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; the status is 1 where a corruption is not caught."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="", help="JSON file for the result")
    chosen = parser.parse_args(arguments)
    from tests.reliability.corruptions import CORRUPTIONS

    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        good = artefacts.build_all(Path(folder) / "good")
        for number, corruption in enumerate(CORRUPTIONS):
            try:
                message = caught(corruption, good, Path(folder) / str(number))
            except Exception as error:
                message = f"not caught: {type(error).__name__}: {error}"
            named = is_named(corruption, message)
            results[corruption.name] = {"caught": named, "message": message.replace(folder, "")}
            print(f"{'caught' if named else 'MISSED'}  {corruption.name}: {message.splitlines()[:1]}")
    count = sum(result["caught"] for result in results.values())
    print(f"{count} of {len(results)} caught with file and place")
    if chosen.out:
        Path(chosen.out).write_text(
            json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
    return int(count < len(results))


if __name__ == "__main__":
    sys.exit(main())
