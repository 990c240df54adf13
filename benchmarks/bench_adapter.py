"""The text adapter, forward and backward: ours against torch's modules, eager and compiled, and its GEMMs alone.

python -m benchmarks.bench_adapter --batch 256 1024 --shape 576x1024 2048x1280

One residual block of twice the width, then LayerNorm and Linear; "gemm_ratio" is the time over that of the same
matrix products alone in the same round. "saved_kib" is what the forward keeps for the backward besides parameters.
The embeddings need no gradient, as in training. A result further from fp64 than the limit is not timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.providers import relative_error
from llm2clip_kernels import adapter
from llm2clip_kernels.adapter import adapter_reference

ERROR_LIMIT = {"float32": 1e-5, "bfloat16": 5e-2, "float16": 1e-2}
Step = Callable[[], list[Tensor]]


@dataclass(frozen=True)
class Case:
    """One shape: embeddings (batch, width) to features (batch, out), `depth` blocks."""

    batch: int
    width: int
    out: int
    depth: int
    dtype: str
    device: str


def leaves_of(case: Case) -> list[Tensor]:
    """Embeddings, upstream gradient, then the parameters as leaves: six a block, four of the head."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    width, hidden = case.width, 2 * case.width
    parameters: list[Tensor] = []
    for _ in range(case.depth):
        parameters += [1 + 0.1 * random(width), 0.1 * random(width), random(hidden, width) * width**-0.5]
        parameters += [0.1 * random(hidden), random(width, hidden) * hidden**-0.5, 0.1 * random(width)]
    parameters += [1 + 0.1 * random(width), 0.1 * random(width)]
    parameters += [random(case.out, width) * width**-0.5, 0.1 * random(case.out)]
    tensors = [random(case.batch, width), random(case.batch, case.out), *parameters]
    placed = [t.to(case.device, getattr(torch, case.dtype)) for t in tensors]
    return placed[:2] + [p.requires_grad_() for p in placed[2:]]


def forward(function: Callable[..., Tensor], leaves: Sequence[Tensor]) -> Tensor:
    """The features of `leaves_of` by `adapter` or its reference."""
    parameters = leaves[2:]
    blocks = [tuple(parameters[i : i + 6]) for i in range(0, len(parameters) - 4, 6)]
    return function(leaves[0], blocks, tuple(parameters[-4:]))


def step_of(name: str, leaves: Sequence[Tensor]) -> Step:
    """A forward and backward that returns the features and every parameter's gradient."""

    def features(*tensors: Tensor) -> Tensor:
        return forward(adapter if name == "ours" else adapter_reference, tensors)

    run = torch.compile(features, dynamic=False) if name == "compile" else features

    def step() -> list[Tensor]:
        y = run(*leaves)
        return [y.detach(), *torch.autograd.grad(y, list(leaves[2:]), leaves[1])]

    return step


def gemms_of(leaves: Sequence[Tensor], case: Case) -> Callable[[], None]:
    """The matrix products of one step on tensors of its shapes, and nothing else."""
    width, hidden = case.width, 2 * case.width
    x = leaves[0]
    inner = x.new_ones(case.batch, hidden)
    w1, w2, w3, dy = x.new_ones(hidden, width), x.new_ones(width, hidden), leaves[-2].detach(), leaves[1]

    def run() -> None:
        for _ in range(case.depth):
            for a, b in ((x, w1.T), (inner, w2.T), (x, w2), (x.T, inner), (inner.T, x), (inner, w1)):
                a @ b
        for a, b in ((x, w3.T), (dy, w3), (dy.T, x)):
            a @ b

    return run


def saved_kib(name: str, case: Case) -> float:
    """What one forward keeps for its backward, parameters not counted, every storage once."""
    leaves = leaves_of(case)
    own = {t.untyped_storage().data_ptr() for t in leaves}
    kept: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = forward(adapter if name == "ours" else adapter_reference, leaves)
    del y
    return sum(t.untyped_storage().nbytes() for t in kept.values()) / 1024


def worst_error(name: str, case: Case) -> float:
    """The largest relative error of the features and gradients against fp64, at no more than 256 rows."""
    small = Case(min(case.batch, 256), case.width, case.out, case.depth, case.dtype, case.device)
    leaves = leaves_of(small)
    exact = [t.detach().double().requires_grad_(i > 1) for i, t in enumerate(leaves)]
    errors = [
        relative_error(g, w) for g, w in zip(step_of(name, leaves)(), step_of("eager", exact)(), strict=True)
    ]
    return max(errors, key=lambda e: float("inf") if e != e else e)


def memory_setup(name: str, case: Case) -> Step:
    """What `harness.peak_mib` measures: one step above inputs and libraries already loaded."""
    small = Case(64, case.width, case.out, case.depth, case.dtype, case.device)
    step = step_of(name, leaves_of(case))
    # what a first call loads or compiles is no memory of the adapter
    (step if name == "compile" else step_of(name, leaves_of(small)))()
    return step


def measure(case: Case, names: Sequence[str], options: argparse.Namespace) -> list[dict[str, Any]]:
    """One interleaved run of all providers at one shape; returns its rows."""
    shape = {
        "batch": case.batch,
        "width": case.width,
        "out": case.out,
        "depth": case.depth,
        "dtype": case.dtype,
    }
    errors = {name: worst_error(name, case) for name in names}
    leaves = leaves_of(case)
    timed: dict[str, Callable[[], Any]] = {"gemms": gemms_of(leaves, case)}
    timed |= {name: step_of(name, leaves) for name in names if errors[name] <= ERROR_LIMIT[case.dtype]}
    times = harness.interleave(
        timed, rounds=options.rounds, max_seconds=options.max_seconds, device=case.device
    )
    rows: list[dict[str, Any]] = []
    for name in ("gemms", *names):
        if name not in times:
            rows.append({"provider": name, **shape, "not_timed": f"wrong result: error {errors[name]:.1e}"})
            continue
        row: dict[str, Any] = {"provider": name, **shape, "rounds": len(times[name])}
        row |= {key: round(value, 3) for key, value in harness.summarize(times[name]).items()}
        row["gemm_ratio"] = round(harness.ratio_to(times[name], times["gemms"]), 3)
        if name != "gemms":
            row["error_vs_fp64"] = float(f"{errors[name]:.1e}")
            if "eager" in times:
                row["speedup_over_eager"] = round(harness.ratio_to(times["eager"], times[name]), 3)
            if name != "compile":  # a compiled graph saves behind the hooks
                row["saved_kib"] = round(saved_kib(name, case), 1)
            if not options.no_memory:
                row["peak_mib"] = round(harness.peak_mib(memory_setup, name, case, device=case.device), 1)
        rows.append(row)
        print(row, flush=True)
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--shape", nargs="+", default=["576x1024", "2048x1280"], help="width x features")
    parser.add_argument("--depth", type=int, default=1, help="residual blocks; the published adapter has 4")
    parser.add_argument("--dtype", default="float32", choices=list(ERROR_LIMIT))
    parser.add_argument("--providers", nargs="+", default=["eager", "compile", "ours"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--max-seconds", type=float, default=20.0, help="of one shape's timing")
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    parser.add_argument("--no-save", action="store_true", help="print only")
    options = parser.parse_args(arguments)
    device = harness.default_device()
    rows: list[dict[str, Any]] = []
    for shape in options.shape:
        width, out = (int(part) for part in shape.split("x"))
        for batch in options.batch:
            rows += measure(
                Case(batch, width, out, options.depth, options.dtype, device), options.providers, options
            )
    if not options.no_save:
        print(harness.save(f"adapter_{options.dtype}", rows))


if __name__ == "__main__":
    main()
