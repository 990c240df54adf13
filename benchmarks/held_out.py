"""OpenStax shards with 300 physics figures held out, whose captions exist in Spanish and in Polish.

python -m benchmarks.held_out --data DIR --out runs/openstax

Physics is a book that training sees, so these figures are new pictures of a known subject, and their Spanish and
Polish captions are languages that no stage is trained on. A training sample that shares a text with a held-out one is
left out of training too. Written to `out`: the training shards without them, `physics/openstax-val-000000.tar` with
them, and the validation shards as they are.
"""

from __future__ import annotations

import argparse
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.captions import OPENSTAX
from llm2clip.errors import DataError
from llm2clip.files import atomic_path

COUNT = 300
LANGUAGES = ("es", "pl")
PHYSICS = Path("physics") / "openstax-val-000000.tar"
Member = tuple[str, bytes]


def samples(path: Path) -> Iterator[tuple[str, list[Member], dict[str, Any]]]:
    """Key, members and record of every sample of a shard, in its order."""
    key, members = "", list[Member]()
    with tarfile.open(path) as tar:
        for info in tar:
            file = tar.extractfile(info)
            if file is None:
                continue
            if info.name.split(".")[0] != key and members:
                yield key, members, _record(members)
                members = []
            key = info.name.split(".")[0]
            members.append((info.name, file.read()))
    if members:
        yield key, members, _record(members)


def _record(members: list[Member]) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(next(data for name, data in members if name.endswith(".json")))
    return record


def texts(record: dict[str, Any]) -> set[str]:
    """The English texts of a sample."""
    return {record[field] for field in ("caption", "alt") if record.get(field)}


def chosen(paths: list[Path], count: int = COUNT) -> set[str]:
    """Keys of the held-out figures, evenly spread over the physics book; no text occurs twice among them."""
    found: list[str] = []
    seen: set[str] = set()
    for path in paths:
        for key, _, record in samples(path):
            translated = all((record.get(language) or {}).get("alt") for language in LANGUAGES)
            own = texts(record)
            if "physics" in record["book"] and translated and len(own) == 2 and seen.isdisjoint(own):
                found.append(key)
                seen |= own
    if len(found) < count:
        raise DataError(
            f"{len(found)} physics figures with captions in {' and '.join(LANGUAGES)} in {len(paths)} training "
            f"shards, {count} are needed; `llm2clip data openstax --help` says how to build them with translations"
        )
    places = np.linspace(0, len(found) - 1, count).round().astype(int)
    return {found[place] for place in places}


def split(data: Path, out: Path, count: int = COUNT) -> dict[str, int]:
    """Write the shards.

    Args:
        data: folder of `openstax-train-*.tar` and `openstax-val-*.tar`.
        out: folder that receives the shards.
        count: figures to hold out.

    Returns:
        How many samples are held out, and how many are left for training.

    Raises:
        DataError: too few figures with both translations.
    """
    paths = sorted(data.glob("openstax-train-*.tar"))
    keys = chosen(paths, count)
    shared = {
        text for path in paths for key, _, record in samples(path) if key in keys for text in texts(record)
    }
    out.mkdir(parents=True, exist_ok=True)
    held: list[Member] = []
    left = 0
    for path in paths:
        kept: list[Member] = []
        for key, members, record in samples(path):
            if key in keys:
                held += members
            elif shared.isdisjoint(texts(record)):
                kept += members
                left += 1
        write(out / path.name, kept)
    write(out / PHYSICS, held)
    for path in sorted(data.glob("openstax-val-*.tar")):
        with atomic_path(out / path.name) as target:
            target.write_bytes(path.read_bytes())
    return {"held_out": len(keys), "left_for_training": left}


def write(path: Path, members: list[Member]) -> None:
    """Write a shard."""
    with atomic_path(path) as target, tarfile.open(target, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=OPENSTAX, help="folder of OpenStax shards")
    parser.add_argument("--out", type=Path, default=Path("runs/openstax"))
    options = parser.parse_args(arguments)
    print(json.dumps(split(options.data, options.out)))


if __name__ == "__main__":
    main()
