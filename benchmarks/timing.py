"""How long functions take beside each other: interleaved rounds, hot or cold caches, GPU events behind a backlog."""

from __future__ import annotations

import math
import re
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch

Cache = Literal["hot", "cold"]

# clock cycles of an idle kernel that the GPU spends while the host queues what is measured, about 1 ms
_BACKLOG_CYCLES = 2_000_000
# flushing more than this on a CPU costs more than what it measures
_FLUSH_LIMIT = 1 << 30
_MOST_ROUNDS = 2000


def default_device() -> str:
    """Returns "cuda" where there is a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def last_level_cache(device: str) -> int:
    """Returns the bytes of the largest cache: L2 of the GPU, or the largest that the CPU's cores name."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(0).L2_cache_size)
    largest = 0
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "": 1}
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        found = re.fullmatch(r"(\d+)([KMG]?)", path.read_text().strip())
        if found:
            largest = max(largest, int(found[1]) * units[found[2]])
    return largest or 32 << 20


class CacheFlusher:
    """Reads and writes a buffer larger than the last cache, so that the next call finds its inputs in memory."""

    def __init__(self, device: str) -> None:
        size = 2 * last_level_cache(device)
        self.buffer = torch.zeros(min(size, _FLUSH_LIMIT) // 4, device=device)

    def __call__(self) -> None:
        self.buffer.add_(1.0)


def _wall_seconds(function: Callable[[], Any], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = function()
    if device == "cuda":
        torch.cuda.synchronize()
    elapsed = time.perf_counter() - start
    del result
    return elapsed


def _event_seconds(function: Callable[[], Any]) -> float:
    """Time between two events on the stream; the host queues all launches while the GPU is still idling."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(_BACKLOG_CYCLES)
    start.record()
    result = function()
    stop.record()
    torch.cuda.synchronize()
    del result
    return float(start.elapsed_time(stop)) / 1e3


def interleave(
    providers: Mapping[str, Callable[[], Any]],
    *,
    rounds: int,
    warmup: int = 1,
    warmup_seconds: float = 0.0,
    min_seconds: float = 0.0,
    max_seconds: float = math.inf,
    cache: Cache = "hot",
    device: str | None = None,
    clock: Literal["auto", "wall"] = "auto",
) -> dict[str, list[float]]:
    """Runs every provider once a round, in turn and in changing order.

    Args:
        providers: name -> what is measured.
        rounds: measured rounds.
        warmup: rounds that are not counted.
        warmup_seconds: warm-up goes on at least so long (GPU clocks settle under load).
        min_seconds: more than `rounds` rounds until so much time is spent, for short functions.
        max_seconds: no round is begun after so much time, but three are always measured.
        cache: "cold" flushes the last cache before every call, outside the measured time.
        device: "cpu" or "cuda"; None is the GPU where there is one.
        clock: "auto" takes CUDA events behind a backlog on a GPU, which leaves launch latency out; "wall" counts
            it. On a CPU both are the wall clock.

    Returns:
        Seconds of every round by provider.
    """
    device = device or default_device()
    flush = CacheFlusher(device) if cache == "cold" else None
    times: dict[str, list[float]] = {name: [] for name in providers}
    names = list(providers)
    begun = time.perf_counter()
    index = measured = 0
    while True:
        now = time.perf_counter() - begun
        warm = index >= warmup and (now >= warmup_seconds or measured > 0)
        if warm and measured == 0:
            begun = time.perf_counter()
            now = 0.0
        if warm and measured > 0:
            enough = measured >= rounds and (now >= min_seconds or measured >= _MOST_ROUNDS)
            late = now >= max_seconds and measured >= min(3, rounds)
            if enough or late:
                break
        # another first one each round: the caches are never always warmed by the same neighbour
        shift = index % len(names)
        for name in names[shift:] + names[:shift]:
            if flush is not None:
                flush()
            if device == "cuda" and clock == "auto":
                elapsed = _event_seconds(providers[name])
            else:
                elapsed = _wall_seconds(providers[name], device)
            if warm:
                times[name].append(elapsed)
        index += 1
        measured += warm
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
