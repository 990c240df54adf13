"""The symmetric contrastive loss, forward and backward: ours against its peers and one plain matmul.

python -m benchmarks.bench_similarity --n 2048 8192 --d 512
python -m benchmarks.bench_similarity --small      # N = 64 to 2048, where launches and fixed costs count
python -m benchmarks.bench_similarity --growth     # N = 8192 to 65536: does the time per pair stay?

"passes" is the time over that of one torch.mm of the same N·N·D in the same round. "gemm_percent" is the share of
the speed of that product into memory that exists already (`mm_out`), at 4 useful passes whatever a provider really
did. Providers that cannot run here, or whose result is wrong, are named with the reason and without a speed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import growth, harness
from benchmarks.contrastive import MINI_BATCHES, PROVIDERS, Case, errors, exact, inputs

# a provider further than this from fp64 is wrong, and its speed is not printed
ERROR_LIMIT = {"float32": 5e-5, "bfloat16": 5e-2, "float16": 1e-2}
# the loss by definition: one product forward, one to recompute it, two for the gradients
USEFUL_PASSES = 4
# of one stripe of the product we compare with; a larger N×N is made stripe by stripe
STRIPE_BYTES = 4 << 30
SMALL = (64, 128, 256, 512, 1024, 2048)
# the largest N at which fp64 takes seconds; larger cases are checked at this one
CHECK_PAIRS = {"cpu": 8192, "cuda": 32768}


def check(case: Case, names: list[str], limit: float) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Runs everyone once against fp64, at the case's own shape or the largest that fp64 serves.

    Returns:
        The errors of those who are right, and of the others the reason why no speed of theirs is printed.
    """
    small = Case(min(case.n, CHECK_PAIRS[case.device]), case.d, case.dtype, case.kind, case.device)
    leaves = inputs(small)
    want = exact(leaves[0], leaves[1], float(leaves[2].detach()))
    found: dict[str, dict[str, float]] = {}
    reasons: dict[str, str] = {}
    for name in names:
        try:
            found[name] = errors(PROVIDERS[name].make(small)(leaves), want)
            if small.n < case.n:
                # one that fails at the full size must not end the run of the others
                PROVIDERS[name].make(case)(inputs(case))
        except Exception as error:
            reasons[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            continue
        wrong = harness.wrong(found[name], limit)
        if wrong:
            reasons[name] = f"wrong result: {wrong}"
    return found, reasons


def memory_setup(name: str, case: Case) -> Callable[[], Any]:
    """What `harness.peak_mib` measures: one step above inputs, gradients and libraries already loaded."""
    step = PROVIDERS[name].make(case)
    leaves = inputs(case)
    # what a first call loads or compiles is no memory of the loss; a compiled step is compiled for its shape
    step(leaves if name == "compile" else inputs(Case(256, case.d, case.dtype, case.kind, case.device)))
    # room for the gradients, touched so that it is resident before the measurement begins
    for leaf in leaves:
        leaf.grad = torch.ones_like(leaf)
    return lambda: step(leaves)


def products(x: torch.Tensor, y: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """The GEMM of the same shape: as one would write it, and at its best, into memory that exists already."""
    rows = max(1, min(len(x), STRIPE_BYTES // (len(y) * x.element_size())))
    out = x.new_empty(rows, len(y))

    def into() -> None:
        for start in range(0, len(x), rows):
            part = x[start : start + rows]
            torch.mm(part, y.T, out=out[: len(part)])

    if rows < len(x):
        return {"mm_out": into}
    return {"mm": lambda: x @ y.T, "mm_out": into}


def time_all(case: Case, names: list[str], options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of every round by provider, in one interleaved run with the products."""
    leaves = inputs(case)
    timed = products(leaves[0].detach(), leaves[1].detach())
    for name in names:
        step = PROVIDERS[name].make(case)
        timed[name] = lambda step=step: step(leaves)  # type: ignore[misc]
    return harness.interleave(
        timed,
        rounds=options.rounds,
        warmup=options.warmup,
        warmup_seconds=options.warmup_seconds,
        min_seconds=options.min_seconds,
        max_seconds=options.max_seconds,
        cache=options.cache,
        device=case.device,
        clock=options.clock,
    )


def measure(case: Case, names: list[str], options: argparse.Namespace) -> list[dict[str, Any]]:
    """One interleaved run of all providers at one shape; returns its rows."""
    shape = {"n": case.n, "d": case.d, "dtype": case.dtype, "inputs": case.kind}
    found, reasons = check(case, names, options.error_limit or ERROR_LIMIT[case.dtype])
    names = [name for name in names if name not in reasons]
    rows: list[dict[str, Any]] = [
        {"provider": name, **shape, "not_timed": reason} for name, reason in reasons.items()
    ]
    times = time_all(case, names, options)
    # of torch.mm as it is called; where its result would be too large, of the stripes
    unit = times.get("mm", times["mm_out"])
    for name, seconds in times.items():
        row: dict[str, Any] = {"provider": name, **shape, "cache": options.cache, "rounds": len(seconds)}
        row |= {key: round(value, 3) for key, value in harness.summarize(seconds).items()}
        useful = USEFUL_PASSES if name in names else 1
        row["passes"] = round(harness.ratio_to(seconds, unit), 3)
        row["gemm_percent"] = round(100 * useful * harness.ratio_to(times["mm_out"], seconds), 1)
        row["effective_gflops"] = round(useful * 2 * case.n**2 * case.d / row["median_ms"] / 1e6, 1)
        if name in names:
            row |= {f"error_{key}": float(f"{error:.1e}") for key, error in found[name].items()}
            row |= {
                f"time_over_{ours}": round(harness.ratio_to(seconds, times[ours]), 3)
                for ours in ("recompute", "cached", "auto")
                if ours in names
            }
            if "eager" in names:
                row["speedup_over_eager"] = round(harness.ratio_to(times["eager"], seconds), 2)
            if not options.no_memory:
                row["peak_mib"] = round(harness.peak_mib(memory_setup, name, case, device=case.device), 1)
        rows.append(row)
        print(row, flush=True)
    return rows


def default_providers(device: str, small: bool) -> list[str]:
    """Everyone worth measuring on this kind of device."""
    if small:
        return ["eager", "open_clip", "compile", "recompute", "cached", "auto"]
    if device == "cuda":
        # no cache of exponentials there, so that all methods are one; and small mini-batches are launches only
        left_out = {"cached", "auto"} | {f"sbert_{size}" for size in MINI_BATCHES if size not in (1024, 4096)}
    else:
        left_out = {"auto"} | {f"sbert_{size}" for size in MINI_BATCHES if size < 512}
    return [
        p.name
        for p in PROVIDERS.providers.values()
        if p.name not in left_out and (device == "cuda" or not p.cuda_only)
    ]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", type=int, nargs="+", help="pairs (default 2048 8192)")
    parser.add_argument("--d", type=int, nargs="+", default=[512], help="features")
    parser.add_argument("--dtype", default="float32", choices=list(ERROR_LIMIT))
    parser.add_argument("--kind", default="random", choices=["random", "trained"])
    parser.add_argument("--device", default=harness.default_device(), choices=["cpu", "cuda"])
    parser.add_argument("--providers", nargs="+", help=f"of {', '.join(PROVIDERS.providers)}")
    parser.add_argument("--small", action="store_true", help="N = 64 to 2048, many rounds")
    parser.add_argument("--growth", action="store_true", help="time per pair from the first N to the last")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds at least")
    parser.add_argument("--warmup", type=int, default=1, help="rounds before them")
    parser.add_argument("--warmup-seconds", type=float, default=0.0, help="and so many seconds at least")
    parser.add_argument("--min-seconds", type=float, default=0.0, help="more rounds until so much is spent")
    parser.add_argument("--max-seconds", type=float, default=float("inf"), help="fewer rounds after so much")
    parser.add_argument(
        "--cache", default="hot", choices=["hot", "cold"], help="cold: flushed before every call"
    )
    parser.add_argument(
        "--clock", default="auto", choices=["auto", "wall"], help="wall: launch latency counts"
    )
    parser.add_argument("--error-limit", type=float, help=f"default by dtype: {ERROR_LIMIT}")
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    parser.add_argument("--no-save", action="store_true", help="print only")
    parser.add_argument("--tag", default="", help="appended to the name of the result files")
    options = parser.parse_args(arguments)
    if options.small:
        options.n = options.n or list(SMALL)
        options.no_memory = True
        options.min_seconds = options.min_seconds or 4.0
    if options.growth:
        options.n = options.n or list(growth.SIZES)
    options.n = options.n or [2048, 8192]
    options.providers = options.providers or default_providers(options.device, options.small)
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    suite = "similarity_growth" if options.growth else "similarity_small" if options.small else "similarity"
    suite += f"_{options.dtype}_{options.kind}{'_cold' if options.cache == 'cold' else ''}{options.tag}"
    rows: list[dict[str, Any]] = []
    reasons: dict[str, str] = {}
    if options.growth:
        cases = [Case(n, options.d[0], options.dtype, options.kind, options.device) for n in options.n]
        rows = growth.measure(cases)
    else:
        usable, reasons = PROVIDERS.choose(options.providers, options.device)
        for reason in reasons.items():
            print("not measured: {}: {}".format(*reason), flush=True)
        for d in options.d:
            for n in options.n:
                # a mini-batch larger than the batch is the batch again
                names = [p.name for p in usable if not p.name.startswith("sbert_") or int(p.name[6:]) <= n]
                rows += measure(Case(n, d, options.dtype, options.kind, options.device), names, options)
                if not options.no_save:
                    # after every shape: a run that is ended keeps what it has
                    harness.save(suite, rows, not_measured=reasons)
    if not options.no_save:
        print(harness.save(suite, rows, not_measured=reasons))
    faults = [row for row in rows if "not_timed" in row and PROVIDERS[row["provider"]].ours]
    if faults:
        sys.exit(f"our own result is wrong or failed, not timed: {faults}")


if __name__ == "__main__":
    main()
