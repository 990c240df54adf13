"""A LoRA layer, forward alone and forward with backward: ours against peft, peft compiled, and two formulations.

python -m benchmarks.bench_lora                                  # SmolLM2-135M's layers and 2048²
python -m benchmarks.bench_lora --dropout 0.05 --t 4096 --r 16   # other rows, ranks, dropout

The base weight is frozen, as in training: gradients are those of x, A and B. "x_over_ours" is the median over rounds
of a provider's time over ours in the same round: above 1, ours is faster. "base" is the plain linear layer, what a
LoRA layer cannot be cheaper than; the others are described in `lora_peers`. Inputs: "float32" all fp32; "bfloat16"
all bf16; "adapters" bf16 with fp32 adapters, peft's default on a bf16 model; "autocast" fp32 weights under autocast to
bf16. At the end stands where peft was faster, if anywhere.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from benchmarks import harness
from benchmarks.lora_peers import PROVIDERS, SCALING, Case, Layer
from benchmarks.providers import relative_error
from benchmarks.report import table
from llm2clip_kernels.lora_linear import lora_linear_reference

# SmolLM2-135M: q, o; k, v; gate, up; down; and a square one of larger models
SHAPES = ("576x576", "576x192", "576x1536", "1536x576", "2048x2048")
KINDS = ("float32", "autocast", "bfloat16", "adapters")
# a provider further than this from fp64 is wrong, and its speed is not printed
ERROR_LIMIT = {"float32": 1e-5, "autocast": 3e-2, "bfloat16": 3e-2, "adapters": 3e-2}
# what two runs of one function differ by on a quiet machine
NOISE = 0.02
# fp64 is slow: results are checked on so many rows
CHECK_ROWS = 256


def errors(name: str, case: Case) -> float:
    """The largest relative error of y, dx, dA and dB against fp64, without dropout."""
    layer = Layer(replace(case, t=min(case.t, CHECK_ROWS), dropout=0.0))
    got = layer.step(PROVIDERS[name].make(layer))
    exact = [t.detach().double().requires_grad_() for t in (layer.x, layer.a, layer.b)]
    y = lora_linear_reference(exact[0], layer.weight.double(), None, exact[1], exact[2], SCALING)
    y.backward(layer.upstream.double())
    want = [y.detach(), *(t.grad for t in exact if t.grad is not None)]
    return max(relative_error(g, w) for g, w in zip(got, want, strict=True))


def memory_setup(name: str, case: Case) -> Callable[[], Any]:
    """What `harness.peak_mib` measures: one step above inputs, gradients and libraries already loaded."""
    small = Layer(replace(case, t=64))
    small.step(PROVIDERS[name].make(small))
    layer = Layer(case)
    call = PROVIDERS[name].make(layer)
    return lambda: layer.step(call)


def measure(case: Case, names: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """One row: our times, and everyone's over ours."""
    row: dict[str, Any] = {"inputs": case.kind, "t": case.t, "k": case.k, "n": case.n, "r": case.r}
    if case.dropout:
        row["dropout"] = case.dropout
    # without dropout inside, it is not the same operation
    names = [name for name in names if not (case.dropout and name == "unsloth")]
    if case.kind == "adapters":
        # both have one dtype for all matrices
        names = [name for name in names if name not in ("unsloth", "lorafusion")]
    found = {name: errors(name, case) for name in names if name != "base"}
    for name, error in found.items():
        if harness.wrong({"": error}, ERROR_LIMIT[case.kind]):
            row[f"{name}_not_timed"] = f"wrong result: {error:.1e}"
            names.remove(name)
    layer = Layer(case)
    calls = {name: PROVIDERS[name].make(layer) for name in names}
    for what, run in (("forward", layer.forward), ("step", layer.step)):
        times = harness.interleave(
            {name: lambda run=run, call=call: run(call) for name, call in calls.items()},  # type: ignore[misc]
            rounds=options.rounds,
            min_seconds=options.min_seconds,
            max_seconds=options.max_seconds,
            warmup=2,
            device=case.device,
        )
        mine = times.get("ours") or next(iter(times.values()))
        row[f"{what}_ms"] = round(harness.summarize(mine)["median_ms"], 3)
        for name, seconds in times.items():
            if name != "ours":
                row[f"{what}_{name}_over_ours"] = round(harness.ratio_to(seconds, mine), 3)
    for name in ("peft", "ours"):
        if name in found:
            row[f"error_{name}"] = float(f"{found[name]:.1e}")
    largest = case.t == max(options.t) and f"{case.k}x{case.n}" in options.memory_shapes
    if largest and case.r in options.memory_r and not options.no_memory:
        for name in names:
            # compiling would count as memory of the step
            if name not in ("base", "compile"):
                row[f"peak_mib_{name}"] = round(
                    harness.peak_mib(memory_setup, name, case, device=case.device), 1
                )
    print(row, flush=True)
    return row


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--t", type=int, nargs="+", help="rows (tokens); default 64 1024, on a GPU 1024 8192")
    parser.add_argument("--shapes", nargs="+", help="KxN of the layers; on a GPU also 4096x4096")
    parser.add_argument("--r", type=int, nargs="+", default=[8, 16, 64], help="ranks")
    parser.add_argument("--inputs", nargs="+", choices=KINDS, help="on a GPU bfloat16 and adapters")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--device", default=harness.default_device(), choices=["cpu", "cuda"])
    parser.add_argument("--providers", nargs="+", default=list(PROVIDERS.providers))
    parser.add_argument("--rounds", type=int, default=3, help="measured rounds at least")
    parser.add_argument("--min-seconds", type=float, default=0.2, help="more rounds until so much is spent")
    parser.add_argument("--max-seconds", type=float, default=1.5, help="fewer rounds after so much")
    parser.add_argument(
        "--memory-r", type=int, nargs="+", default=[16], help="ranks whose memory is measured"
    )
    parser.add_argument(
        "--memory-shapes", nargs="+", default=["576x1536", "2048x2048", "4096x4096"], help="and layers"
    )
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    parser.add_argument("--no-save", action="store_true", help="print only")
    parser.add_argument("--tag", default="", help="appended to the name of the result files")
    options = parser.parse_args(arguments)
    gpu = options.device == "cuda"
    options.t = options.t or ([1024, 8192] if gpu else [64, 1024])
    options.shapes = options.shapes or [*SHAPES, *(["4096x4096"] if gpu else [])]
    options.inputs = options.inputs or (["bfloat16", "adapters"] if gpu else ["float32", "autocast"])
    return options


def summary(rows: list[dict[str, Any]]) -> str:
    """A table of every provider's time over ours, and in how many cases peft was faster by more than `NOISE`."""
    keys = [k for row in rows for k in row if k.endswith("_over_ours")]
    titles = {k.replace("_over_ours", ""): k for k in dict.fromkeys(keys)}
    shown = {"inputs": "inputs", "T": "t", "K": "k", "N": "n", "R": "r", "step ms": "step_ms"} | titles
    slower = [
        f"{row['inputs']} T={row['t']} {row['k']}x{row['n']} R={row['r']} {what}: {row[key]}"
        for row in rows
        for what, key in (("forward", "forward_peft_over_ours"), ("step", "step_peft_over_ours"))
        if row.get(key, 1.0) < 1 - NOISE
    ]
    text = "\n  ".join(slower) or "none"
    return f"{table(rows, shown)}\n\npeft faster than ours by more than {NOISE:.0%}:\n  {text}"


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    usable, reasons = PROVIDERS.choose(options.providers, options.device)
    for reason in reasons.items():
        print("not measured: {}: {}".format(*reason), flush=True)
    rows: list[dict[str, Any]] = []
    for kind in options.inputs:
        for shape in options.shapes:
            k, n = map(int, shape.split("x"))
            for t in options.t:
                for r in options.r:
                    case = Case(t, k, n, r, kind, options.dropout, options.device)
                    rows.append(measure(case, [p.name for p in usable], options))
    print(summary(rows))
    suite = f"lora{'_dropout' if options.dropout else ''}{options.tag}"
    if not options.no_save:
        print(harness.save(suite, rows, not_measured=reasons))
    faults = [row for row in rows if "ours_not_timed" in row]
    if faults:
        sys.exit(f"our own result is wrong, not timed: {faults}")


if __name__ == "__main__":
    main()
