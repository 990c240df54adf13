"""What the native host module gains over its Python twins: tar index and caption packing.

python -m benchmarks.bench_host --members 100000 --captions 20000

Results are checked to be equal before anything is timed.
"""

from __future__ import annotations

import argparse
import io
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import harness
from llm2clip import packing
from llm2clip.data import shards


def compare(
    op: str, case: str, python: Callable[[], Any], native: Callable[[], Any], rounds: int
) -> dict[str, Any]:
    """Medians of interleaved runs and the median ratio of the two."""
    times = harness.interleave({"python": python, "native": native}, rounds=rounds)
    row: dict[str, Any] = {"op": op, "case": case}
    for name in times:
        row |= {f"{name}_{key}": round(value, 3) for key, value in harness.summarize(times[name]).items()}
    row["speedup"] = round(harness.ratio_to(times["python"], times["native"]), 1)
    print(row, flush=True)
    return row


def write_shard(path: Path, members: int) -> None:
    """A tar of `members` files of 100 bytes."""
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for number in range(members):
            info = tarfile.TarInfo(f"{number:08d}.txt")
            info.size = 100
            tar.addfile(info, io.BytesIO(bytes(100)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--members", type=int, default=100_000, help="members of the tar shard")
    parser.add_argument("--captions", type=int, default=20_000, help="captions to pack")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-save", action="store_true", help="print only")
    options = parser.parse_args()
    if shards._host is None or packing._host is None:
        raise SystemExit("llm2clip._host is not built; install from source with pybind11 and a C++ compiler")
    host = packing._host
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "shard.tar"
        write_shard(path, options.members)
        assert shards.index_tar(path) == shards.index_tar_python(path)
        rows.append(
            compare(
                "index_tar",
                f"{options.members} members",
                lambda: shards.index_tar_python(path),
                lambda: shards.index_tar(path),
                options.rounds,
            )
        )
    # lengths like those of real captions: median 30 tokens, a tail to the encoder's limit
    lengths = np.clip(np.random.default_rng(0).lognormal(3.4, 0.7, options.captions), 3, 512).astype(np.int64)
    for budget in (512, 4096):
        assert np.array_equal(packing.pack_python(lengths, budget), host.pack(lengths, budget))
        rows.append(
            compare(
                "pack",
                f"{options.captions} captions, {budget} tokens",
                lambda budget=budget: packing.pack_python(lengths, budget),  # type: ignore[misc]
                lambda budget=budget: host.pack(lengths, budget),  # type: ignore[misc]
                options.rounds,
            )
        )
    if not options.no_save:
        print(harness.save("host", rows))


if __name__ == "__main__":
    main()
