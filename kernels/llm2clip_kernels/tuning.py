"""Which tile a Triton kernel runs with: a table, a rule for what is not in it, and a search on request.

The table is keyed by architecture, element size and how deep D is. `LLM2CLIP_AUTOTUNE=1` lets every op time its
candidates on its first call with shapes of a new kind, and keeps the winners in a file, so that the next process
need not search. The search never runs while a CUDA graph is captured.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import _env


@dataclass(frozen=True)
class Config:
    """Tile of S (rows, columns), its depth along D, and how the program runs.

    max_registers caps the registers of a thread, so that more programs fit a multiprocessor; 0 for no cap.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    max_registers: int = 0

    def options(self) -> dict[str, int]:
        """Returns the tile and the compiler's options as a launch takes them."""
        chosen = {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_K": self.block_k}
        chosen |= {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return chosen | ({"maxnreg": self.max_registers} if self.max_registers else {})


# The largest tiles of which every kernel compiles without spills. None of them has been timed on a GPU yet.
_CONFIGS = {
    ("cuda", 8, 2): Config(128, 128, 32, 8, 3),
    ("cuda", 9, 2): Config(128, 128, 64, 8, 3),
    ("cuda", 10, 2): Config(128, 32, 64, 8, 4),
    ("hip", 9, 2): Config(128, 128, 32, 8, 2),
    ("interpreter", 0, 2): Config(16, 16, 16, 1, 1),
    ("interpreter", 0, 4): Config(16, 16, 16, 1, 1),
}
# found by searching, by device name, op, element size and depth; read from the user's file
_Key = tuple[str, str, int, int]


def depth_bucket(d: int) -> int:
    """Returns D rounded up to a power of two between 16 and 4096: what configurations are kept by."""
    return min(4096, max(16, 1 << max(0, d - 1).bit_length()))


def choose_config(target: str, major: int, element_size: int, d: int = 4096) -> Config:
    """Returns the tile for an architecture; those not in the table get one that fits everywhere.

    Args:
        target: "cuda", "hip" or "interpreter".
        major: major compute capability.
        element_size: bytes of an element of the inputs.
        d: columns of the inputs; a tile is never deeper than they are.
    """
    config = _CONFIGS.get((target, major, element_size), Config(64, 64, 32, 4, 2))
    if depth_bucket(d) < config.block_k:
        config = replace(config, block_k=depth_bucket(d))
    # stages beyond the number of steps along D only take shared memory
    steps = math.ceil(max(1, d) / config.block_k)
    return replace(config, num_stages=max(1, min(config.num_stages, steps)))


def config_for(x: Tensor) -> Config:
    """Returns the tile for the device, the dtype and the depth of x (M, D)."""
    d = x.shape[-1]
    if _env.triton_interpreted():
        return choose_config("interpreter", 0, x.element_size(), d)
    if torch.version.hip:
        return choose_config("hip", 9, x.element_size(), d)
    return choose_config("cuda", torch.cuda.get_device_capability(x.device)[0], x.element_size(), d)


def candidates(config: Config) -> list[Config]:
    """Returns the configurations a search tries: the given one first, then others that often win."""
    shapes = [
        (128, 128, 8),
        (128, 128, 4),
        (128, 256, 8),
        (256, 128, 8),
        (64, 256, 8),
        (128, 64, 4),
        (64, 128, 4),
    ]
    found = [config]
    for block_m, block_n, warps in shapes:
        for block_k in {min(config.block_k, 32), config.block_k}:
            for stages in (2, 3, 4):
                found.append(Config(block_m, block_n, block_k, warps, stages))
    # two programs on a multiprocessor: one's exponentials behind the other's products
    found.append(replace(config, max_registers=128))
    return list(dict.fromkeys(found))


def _median_ms(run: Callable[[], Any]) -> float:
    times = []
    for _ in range(7):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    # the first two warm up
    return statistics.median(times[2:])


class Tuner:
    """Finds and remembers configurations.

    Args:
        path: JSON file of what was found; it need not exist.
        measure: milliseconds of a call; raises where a configuration cannot run.
    """

    def __init__(self, path: Path, measure: Callable[[Callable[[], Any]], float] = _median_ms) -> None:
        self.path, self.measure = path, measure
        self.found: dict[_Key, Config] = self._read()

    def _read(self) -> dict[_Key, Config]:
        try:
            rows = json.loads(self.path.read_text())
            return {tuple(row.pop("key")): Config(**row) for row in rows}  # type: ignore[misc]
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            # absent or damaged: search again
            return {}

    def _write(self) -> None:
        rows = [{"key": list(key), **asdict(config)} for key, config in sorted(self.found.items())]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=self.path.parent, suffix=".tmp")
        with os.fdopen(handle, "w") as file:
            json.dump(rows, file, indent=1)
        os.replace(name, self.path)

    def best(
        self, key: _Key, run: Callable[[Config], Any], default: Config, among: Iterable[Config]
    ) -> Config:
        """Returns the fastest configuration that runs, searching only for a key not seen before.

        Args:
            key: device name, op, element size, depth bucket.
            run: launches the kernel with a configuration; its result is thrown away.
            default: what to use where none of them runs.
            among: the configurations to try.
        """
        if key in self.found:
            return self.found[key]
        times: dict[Config, float] = {}
        for config in among:
            try:
                times[config] = self.measure(lambda config=config: run(config))  # type: ignore[misc]
            except Exception:  # noqa: BLE001
                # too much shared memory, too many registers, a compiler's fault: not this one
                continue
        self.found[key] = min(times, key=times.__getitem__) if times else default
        self._write()
        return self.found[key]


_TUNER = Tuner(_env.tuning_file()) if _env.autotune() else None


def tuned(op: str, x: Tensor, run: Callable[[Config], Any]) -> Config:
    """Returns the configuration of an op for inputs like x: from the table, or searched for on request.

    Args:
        op: name of the kernel.
        x: (M, D), for its device, dtype and depth.
        run: launches the kernel with a configuration; only called when searching.
    """
    config = config_for(x)
    if _TUNER is None or not x.is_cuda or torch.cuda.is_current_stream_capturing():
        return config
    key = (torch.cuda.get_device_name(x.device), op, x.element_size(), depth_bucket(x.shape[-1]))
    return _TUNER.best(key, run, config, candidates(config))
