"""What the native host module gains over its Python twins.

python benchmarks/bench_host.py [--members 100000] [--captions 20000]

Results are checked to be equal before they are timed; times are the best of several runs.
"""

from __future__ import annotations

import argparse
import io
import json
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from llm2clip import packing
from llm2clip.data import shards


def best(run: Callable[[], Any], repeats: int = 5) -> float:
    """Shortest of several runs in seconds."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--members", type=int, default=100_000, help="members of the tar shard")
    parser.add_argument("--captions", type=int, default=20_000, help="captions to pack")
    args = parser.parse_args()
    if shards._host is None:
        raise SystemExit("llm2clip._host is not built; build the package from source first")
    results = []
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "shard.tar"
        with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
            for number in range(args.members):
                info = tarfile.TarInfo(f"{number:08d}.txt")
                info.size = 100
                tar.addfile(info, io.BytesIO(bytes(100)))
        assert shards.index_tar(path) == shards.index_tar_python(path)
        python, native = (
            best(lambda: shards.index_tar_python(path), 3), best(lambda: shards.index_tar(path))
        )  # fmt: skip
        results.append(("index_tar", f"{args.members} members", python, native))

    # lengths like those of real captions: median 30 tokens, a tail to the encoder's limit
    lengths = np.clip(np.random.default_rng(0).lognormal(3.4, 0.7, args.captions), 3, 512).astype(np.int64)
    for budget in (512, 4096):
        expected = packing.pack_python(lengths, budget)
        assert np.array_equal(expected, packing._host.pack(lengths, budget))
        python = best(lambda budget=budget: packing.pack_python(lengths, budget), 2)
        native = best(lambda budget=budget: packing._host.pack(lengths, budget))
        results.append(("pack", f"{args.captions} captions, {budget} tokens", python, native))

    for name, case, python, native in results:
        times = f"Python {python * 1e3:9.2f} ms   native {native * 1e3:8.2f} ms"
        print(f"{name:<10} {case:<30} {times}   {python / native:6.1f}x")
    print(json.dumps([{"name": n, "case": c, "python_s": p, "native_s": t} for n, c, p, t in results]))


if __name__ == "__main__":
    main()
