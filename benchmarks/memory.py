"""How much memory one run needs above what its inputs and gradients hold already."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import default_device


def _high_water_kib() -> int:
    found = re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1])


def _return_free_memory() -> None:
    """Gives freed memory back to the system: what the set-up freed must not hide what the run allocates."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _measure_resident(
    setup: Callable[..., Callable[[], Any]], args: tuple[Any, ...], threads: int, queue: Any
) -> None:
    try:
        torch.set_num_threads(threads)
        run = setup(*args)
        _return_free_memory()
        # the kernel then starts the high-water mark anew, from what is resident now
        Path("/proc/self/clear_refs").write_text("5")
        before = _high_water_kib()
        start = time.perf_counter()
        result = run()
        seconds = time.perf_counter() - start
        queue.put(((_high_water_kib() - before) / 1024, seconds))
        del result
    except BaseException as error:
        queue.put(error if isinstance(error, Exception) else RuntimeError(repr(error)))
        raise


def _measure_allocated(setup: Callable[..., Callable[[], Any]], args: tuple[Any, ...]) -> tuple[float, float]:
    run = setup(*args)
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    start = time.perf_counter()
    result = run()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    growth = (torch.cuda.max_memory_allocated() - before) / 2**20
    del result
    return growth, seconds


def peak_and_seconds(
    setup: Callable[..., Callable[[], Any]], *args: Any, device: str | None = None, timeout: float = 600
) -> tuple[float, float]:
    """Returns by how much one run raises peak memory, in MiB, and how long that run took.

    On a CPU it is the growth of the peak resident set, in a process of its own with this one's number of
    threads; on a GPU the growth of what torch's allocator holds, in this process.

    Args:
        setup: called with `args`; makes the inputs, touches their gradients, and returns what is measured.
            On a CPU it and `args` must be picklable.
        device: "cpu" or "cuda"; None is the GPU where there is one.
        timeout: seconds after which the process is given up.

    Raises:
        Exception: whatever the run raised; queue.Empty after the timeout.
    """
    if (device or default_device()) == "cuda":
        return _measure_allocated(setup, args)
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_measure_resident, args=(setup, args, torch.get_num_threads(), queue))
    process.start()
    try:
        answer = queue.get(timeout=timeout)
    finally:
        process.join(timeout=10)
        if process.is_alive():
            process.terminate()
    if isinstance(answer, Exception):
        raise answer
    growth, seconds = answer
    return float(growth), float(seconds)


def peak_mib(setup: Callable[..., Callable[[], Any]], *args: Any, device: str | None = None) -> float:
    """Returns by how much one run raises peak memory, in MiB; see `peak_and_seconds`."""
    return peak_and_seconds(setup, *args, device=device)[0]
