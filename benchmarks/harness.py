"""Times providers of one operation against each other, and only if their results are right.

Providers run interleaved, so that whatever else the machine does falls on all of them alike; what is quoted
is the ratio to a reference measured in the same rounds. Memory is the growth of the peak resident set in a
process of its own. Results go to benchmarks/results/<machine>/ as CSV and JSON with versions and commit.
"""

from __future__ import annotations

import csv
import json
import multiprocessing
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from llm2clip_kernels import build_info

RESULTS = Path(__file__).parent / "results"


def machine_name() -> str:
    """Returns a folder name for this machine: its GPU, else its processor's model."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    else:
        text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
        found = re.search(r"model name\s*:\s*(.+)", text)
        name = found[1] if found else platform.machine()
        name = f"{name} {torch.get_num_threads()} threads"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def interleave(
    providers: Mapping[str, Callable[[], Any]], *, rounds: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Runs every provider once a round, in turn and in changing order.

    Returns:
        Seconds of every round by provider.
    """
    times: dict[str, list[float]] = {name: [] for name in providers}
    names = list(providers)
    for index in range(warmup + rounds):
        # another first one each round: the caches are never always warmed by the same neighbour
        for name in names[index % len(names) :] + names[: index % len(names)]:
            _synchronize()
            start = time.perf_counter()
            result = providers[name]()
            _synchronize()
            elapsed = time.perf_counter() - start
            del result
            if index >= warmup:
                times[name].append(elapsed)
    return times


def summarize(times: list[float]) -> dict[str, float]:
    """Returns median and 20th and 80th percentile in milliseconds."""
    ordered = sorted(1e3 * t for t in times)
    last = len(ordered) - 1
    return {
        "median_ms": statistics.median(ordered),
        "p20_ms": ordered[round(0.2 * last)],
        "p80_ms": ordered[round(0.8 * last)],
    }


def ratio_to(times: list[float], reference: list[float]) -> float:
    """Returns the median over rounds of the ratio to the reference's time of the same round."""
    return statistics.median(t / r for t, r in zip(times, reference, strict=True))


def _high_water_kib() -> int:
    found = re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1])


def _measure_peak(setup: Callable[..., Callable[[], Any]], args: tuple[Any, ...], queue: Any) -> None:
    run = setup(*args)
    # the kernel then starts the high-water mark anew, from what is resident now
    Path("/proc/self/clear_refs").write_text("5")
    before = _high_water_kib()
    result = run()
    queue.put((_high_water_kib() - before) / 1024)
    del result


def peak_mib(setup: Callable[..., Callable[[], Any]], *args: Any) -> float:
    """Returns by how much one run raises the peak resident set, in MiB.

    Args:
        setup: called in a new process with `args`; makes the inputs, touches their gradients, and returns
            what is measured.
    """
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_measure_peak, args=(setup, args, queue))
    process.start()
    growth: float = queue.get(timeout=600)
    process.join()
    return growth


def _commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    return done.stdout.strip() or "unknown"


def save(name: str, rows: list[dict[str, Any]]) -> Path:
    """Writes `<name>.csv` and `<name>.json` (rows, versions, commit) for this machine; returns the CSV."""
    folder = RESULTS / machine_name()
    folder.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with open(folder / f"{name}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    record = {"commit": _commit(), "threads": torch.get_num_threads(), "build": build_info(), "rows": rows}
    (folder / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    return folder / f"{name}.csv"
