"""Memory over many calls of every native op and host function: `python -m tests.reliability.leaks --calls 10000`.

Resident memory shows what is lost in any allocator, with the noise of pages; what the C library has handed out shows
single lost blocks of native code.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

LIMIT_MIB = 1.0


class _Mallinfo(ctypes.Structure):
    _fields_ = [  # noqa: RUF012 - ctypes wants a list
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
        )
    ]  # fmt: skip


def malloc_bytes() -> int | None:
    """Bytes that glibc's malloc has handed out and not got back; None with another C library or under ASan."""
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallinfo2") or "libasan" in os.environ.get("LD_PRELOAD", ""):
        return None
    library.mallinfo2.restype = _Mallinfo
    found = library.mallinfo2()
    return int(found.uordblks + found.hblkhd)


def resident_bytes() -> int:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def growth(call: Callable[[], Any], calls: int, warm_up: int = 200) -> dict[str, float | None]:
    """By how many KiB memory grows over `calls` calls, after some that fill caches."""
    for _ in range(warm_up):
        call()
    start, resident, handed = time.perf_counter(), resident_bytes(), malloc_bytes()
    for _ in range(calls):
        call()
    return {
        "resident_kib": round((resident_bytes() - resident) / 1024, 1),
        "malloc_kib": None if handed is None else round(((malloc_bytes() or 0) - handed) / 1024, 1),
        "seconds": round(time.perf_counter() - start, 1),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; the status is 1 where memory grows by a MiB or more."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--out", default="", help="JSON file for the result")
    chosen = parser.parse_args(arguments)
    os.environ.setdefault(
        "LLM2CLIP_SMALL_PAIRS", "0"
    )  # the kernels, not plain torch, however small the input
    import torch

    from tests.reliability.native_calls import host_calls, op_calls

    torch.set_num_threads(1)
    result: dict[str, Any] = {"calls": chosen.calls, "ops": {}}
    for name, call in {**op_calls(), **host_calls()}.items():
        entry = growth(call, chosen.calls)
        if (entry["resident_kib"] or 0) >= 1024 * LIMIT_MIB:
            # Python takes memory by the MiB; what is lost in every call is lost in these, too
            entry = growth(call, chosen.calls)
        result["ops"][name] = entry
        print(name, json.dumps(result["ops"][name]), flush=True)
    worst = max(entry["resident_kib"] for entry in result["ops"].values()) / 1024
    result["worst_mib"] = round(worst, 3)
    print(f"largest growth: {worst:.3f} MiB over {chosen.calls} calls")
    if chosen.out:
        Path(chosen.out).write_text(json.dumps(result, indent=2) + "\n")
    return int(worst >= LIMIT_MIB)


if __name__ == "__main__":
    sys.exit(main())
