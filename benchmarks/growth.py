"""Does the loss stay O(N²) in time and O(N·D) in memory as the batch grows?

One process per N measures both in one forward and backward of `infonce_loss` with recompute. The first N is
measured again at the end: what the machine did meanwhile shows in the difference.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import harness
from benchmarks.contrastive import PROVIDERS, Case, inputs

SIZES = (8192, 16384, 32768, 65536)
# runs of the first size, before and after; the larger ones run once
_REPEATS = 2
_TIMEOUT = 1800.0


def setup(case: Case) -> Callable[[], Any]:
    """One step whose inputs, gradients and libraries are there already."""
    step = PROVIDERS["recompute"].make(case)
    step(inputs(Case(min(1024, case.n), case.d, case.dtype, case.kind, case.device)))
    leaves = inputs(case)
    for leaf in leaves:
        leaf.grad = torch.ones_like(leaf)
    return lambda: step(leaves)


def rows_of(runs: list[tuple[Case, float, float]]) -> list[dict[str, Any]]:
    """Rows from (case, MiB, seconds): time per pair, and that over the first size's median."""
    first = runs[0][0].n
    base = statistics.median(seconds / first**2 for case, _, seconds in runs if case.n == first)
    return [
        {
            "provider": "recompute",
            "n": case.n,
            "d": case.d,
            "dtype": case.dtype,
            "inputs": case.kind,
            "seconds": round(seconds, 3),
            "ns_per_pair": round(1e9 * seconds / case.n**2, 4),
            "per_pair_over_first": round(seconds / case.n**2 / base, 3),
            "peak_mib": round(mib, 1),
            "mib_of_one_matrix": round(case.n**2 * getattr(torch, case.dtype).itemsize / 2**20, 1),
        }
        for case, mib, seconds in runs
    ]


def measure(cases: list[Case]) -> list[dict[str, Any]]:
    """Runs the cases in order, the first twice before and twice after the others; returns their rows."""
    runs = []
    for case in [cases[0]] * _REPEATS + cases[1:] + [cases[0]] * _REPEATS:
        mib, seconds = harness.peak_and_seconds(setup, case, device=case.device, timeout=_TIMEOUT)
        runs.append((case, mib, seconds))
        print(f"n {case.n}: {seconds:.2f} s, {mib:.1f} MiB", flush=True)
    return rows_of(runs)
