"""Ranks of the right answers in both directions, and the k best candidates: ours against the whole matrix.

python -m benchmarks.bench_rank --n 2048 8192 --d 512

The least work is one product N·N·D; "gemm_percent" is the share of its speed as plain torch.mm in the same round.
Results are compared with fp64: "wrong" is the share of ranks, or of rows of indices, that differ. Ours must have none.
A peer may have some in fp32, and nearly all in half precision, where the whole matrix is rounded to it; it is timed
with that share beside it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import harness
from llm2clip_kernels import similarity_rank, similarity_topk

# a peer with a larger share of wrong results does something else
WRONG_LIMIT = {"float32": 0.02, "bfloat16": 1.0, "float16": 1.0}
CHECK_ROWS = 2048
K = 10
# rows of the whole matrix at a time in the peers that cut it
STRIPE = 512
Features = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Case:
    """N rows a side of D features, dtype and device by name; "random" or "trained" (right answers correlate)."""

    n: int
    d: int
    dtype: str = "float32"
    device: str = "cpu"
    kind: str = "random"


def inputs(case: Case) -> Features:
    """x, y (n, d), unit norm."""
    generator = torch.Generator(case.device).manual_seed(0)
    x, y = (torch.randn(case.n, case.d, generator=generator, device=case.device) for _ in range(2))
    if case.kind == "trained":
        y = 0.3 * x + y
    return tuple(F.normalize(t, dim=1).to(getattr(torch, case.dtype)) for t in (x, y))  # type: ignore[return-value]


def compared(x: Tensor, y: Tensor) -> Sequence[Tensor]:
    """Ranks from the whole matrix, by comparing with its diagonal."""
    scores = x @ y.T
    best = scores.diagonal()
    return (scores > best[:, None]).sum(1) + 1, (scores > best).sum(0) + 1


def sorted_ranks(x: Tensor, y: Tensor) -> Sequence[Tensor]:
    """Ranks from the whole matrix, by sorting every row and column, as evaluation scripts do."""
    scores = x @ y.T
    own = torch.arange(len(x), device=x.device)[:, None]
    return tuple((s.argsort(dim=1, descending=True) == own).int().argmax(1) + 1 for s in (scores, scores.T))


def striped_topk(x: Tensor, y: Tensor) -> Sequence[Tensor]:
    """The best by stripes of rows: torch's product and torch.topk, without the whole matrix."""
    return (torch.cat([torch.topk(part @ y.T, K, dim=1).indices for part in x.split(STRIPE)]),)


def _chunked(
    function: Callable[[Tensor, Tensor], Sequence[Tensor]],
) -> Callable[[Tensor, Tensor], Sequence[Tensor]]:
    def run(x: Tensor, y: Tensor) -> Sequence[Tensor]:
        before = os.environ.get("LLM2CLIP_BACKEND")
        os.environ["LLM2CLIP_BACKEND"] = "chunked"
        try:
            return function(x, y)
        finally:
            del os.environ["LLM2CLIP_BACKEND"]
            if before is not None:
                os.environ["LLM2CLIP_BACKEND"] = before

    return run


def _our_topk(x: Tensor, y: Tensor) -> Sequence[Tensor]:
    return (similarity_topk(x, y, K)[1],)


PROVIDERS = harness.Registry()
for _provider in (
    harness.Provider("rank_argsort", lambda: sorted_ranks),
    harness.Provider("rank_compare", lambda: compared),
    harness.Provider("rank_chunked", lambda: _chunked(similarity_rank), ours=True),
    harness.Provider("rank", lambda: similarity_rank, ours=True),
    harness.Provider("topk_whole", lambda: lambda x, y: (torch.topk(x @ y.T, K, dim=1).indices,)),
    harness.Provider("topk_striped", lambda: striped_topk),
    harness.Provider("topk_chunked", lambda: _chunked(_our_topk), ours=True),
    harness.Provider("topk", lambda: _our_topk, ours=True),
):
    PROVIDERS.add(_provider)
# what a speed-up is relative to
BASELINE = {"rank": "rank_compare", "topk": "topk_whole"}


def wrong_share(name: str, case: Case) -> float:
    """The share of results that differ from those of fp64 scores."""
    x, y = inputs(replace(case, n=min(case.n, CHECK_ROWS)))
    exact = x.double(), y.double()
    if name.startswith("rank"):
        want: Sequence[Tensor] = compared(*exact)
    else:
        want = (torch.topk(exact[0] @ exact[1].T, K, dim=1).indices,)
    got = PROVIDERS[name].make()(x, y)
    differing = [(g != w).reshape(len(w), -1).any(1).double().mean() for g, w in zip(got, want, strict=True)]
    return float(torch.stack(differing).amax())


def memory_setup(name: str, case: Case) -> Callable[[], Any]:
    """What `harness.peak_mib` measures: one run above the features and what a first call loads."""
    run = PROVIDERS[name].make()
    run(*inputs(replace(case, n=256)))
    features = inputs(case)
    return lambda: run(*features)


def measure(case: Case, names: list[str], options: argparse.Namespace) -> list[dict[str, Any]]:
    """One interleaved run of all providers at one shape; returns its rows."""
    shape = {"n": case.n, "d": case.d, "dtype": case.dtype, "inputs": case.kind}
    shares = {name: wrong_share(name, case) for name in names}
    rows: list[dict[str, Any]] = []
    for name in list(names):
        if shares[name] > (0.0 if PROVIDERS[name].ours else WRONG_LIMIT[case.dtype]):
            rows.append({"provider": name, **shape, "not_timed": f"wrong: {shares[name]:.1e} of the results"})
            names = [other for other in names if other != name]
    x, y = inputs(case)
    timed: dict[str, Callable[[], Any]] = {"mm": lambda: x @ y.T}
    for name in names:
        run = PROVIDERS[name].make()
        timed[name] = lambda run=run: run(x, y)  # type: ignore[misc]
    times = harness.interleave(
        timed, rounds=options.rounds, max_seconds=options.max_seconds, device=case.device
    )
    for name in names:
        seconds = times[name]
        row: dict[str, Any] = {"provider": name, **shape, "rounds": len(seconds), "wrong": shares[name]}
        row |= {key: round(value, 3) for key, value in harness.summarize(seconds).items()}
        row["gemm_percent"] = round(100 * harness.ratio_to(times["mm"], seconds), 1)
        row["effective_gflops"] = round(2 * case.n**2 * case.d / statistics.median(seconds) / 1e9, 1)
        baseline = BASELINE[name.split("_")[0]]
        if baseline in names:
            row["speedup_over_whole"] = round(harness.ratio_to(times[baseline], seconds), 2)
        if not options.no_memory:
            row["peak_mib"] = round(harness.peak_mib(memory_setup, name, case, device=case.device), 1)
        rows.append(row)
        print(row, flush=True)
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", type=int, nargs="+", default=[2048, 8192], help="rows a side")
    parser.add_argument("--d", type=int, default=512, help="features")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--kind", default="random", choices=["random", "trained"])
    parser.add_argument("--device", default=harness.default_device(), choices=["cpu", "cuda"])
    parser.add_argument("--providers", nargs="+", default=list(PROVIDERS.providers))
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds")
    parser.add_argument("--max-seconds", type=float, default=60.0, help="fewer rounds after so much")
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    parser.add_argument("--no-save", action="store_true", help="print only")
    options = parser.parse_args(arguments)
    usable, reasons = PROVIDERS.choose(options.providers, options.device)
    names = [provider.name for provider in usable]
    rows: list[dict[str, Any]] = []
    for n in options.n:
        case = Case(n, options.d, options.dtype, options.device, options.kind)
        rows += measure(case, names, options)
    if not options.no_save:
        suffix = "" if options.kind == "random" else f"_{options.kind}"
        print(harness.save(f"rank_{options.dtype}{suffix}", rows, not_measured=reasons))
    faults = [row for row in rows if "not_timed" in row and PROVIDERS[row["provider"]].ours]
    if faults:
        sys.exit(f"our own result is wrong, not timed: {faults}")


if __name__ == "__main__":
    main()
