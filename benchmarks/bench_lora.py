"""A LoRA layer, forward alone and forward with backward: ours against peft, peft compiled, and unsloth's formulation.

python -m benchmarks.bench_lora                                  # SmolLM2-135M's layers and 2048²
python -m benchmarks.bench_lora --dropout 0.05 --t 4096 --r 16   # other rows, ranks, dropout

The base weight is frozen, as in training: gradients are those of x, A and B. "x_over_ours" is the median over rounds
of a provider's time over ours in the same round: above 1, ours is faster. "base" is the plain linear layer, what a
LoRA layer cannot be cheaper than. Inputs: "float32" all fp32; "bfloat16" all bf16; "adapters" bf16 with fp32 adapters,
peft's default on a bf16 model; "autocast" fp32 weights under autocast to bf16.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import harness
from benchmarks.providers import Provider, Registry, relative_error
from llm2clip_kernels import lora_linear
from llm2clip_kernels.lora_linear import lora_linear_reference

# SmolLM2-135M: q, o; k, v; gate, up; down; and a square one of larger models
SHAPES = ("576x576", "576x192", "576x1536", "1536x576", "2048x2048")
KINDS = ("float32", "autocast", "bfloat16", "adapters")
SCALING = 2.0
# a provider further than this from fp64 is wrong, and its speed is not printed
ERROR_LIMIT = {"float32": 1e-5, "autocast": 3e-2, "bfloat16": 3e-2, "adapters": 3e-2}
# fp64 is slow: results are checked on so many rows
CHECK_ROWS = 256

Call = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """T rows through an N×K layer of rank R."""

    t: int
    k: int
    n: int
    r: int
    kind: str
    dropout: float = 0.0
    device: str = "cpu"


class Layer:
    """The tensors of one case: x (T, K), weight (N, K) frozen, a (R, K), b (N, R), and the upstream gradient."""

    def __init__(self, case: Case) -> None:
        generator = torch.Generator().manual_seed(0)
        base = torch.bfloat16 if case.kind in ("bfloat16", "adapters") else torch.float32
        low = torch.bfloat16 if case.kind == "bfloat16" else torch.float32

        def make(rows: int, cols: int, scale: float, dtype: torch.dtype) -> Tensor:
            return (torch.randn(rows, cols, generator=generator) * scale).to(case.device, dtype)

        self.case = case
        self.x = make(case.t, case.k, 1.0, base).requires_grad_()
        self.weight = make(case.n, case.k, case.k**-0.5, base)
        self.a = make(case.r, case.k, case.k**-0.5, low).requires_grad_()
        self.b = make(case.n, case.r, 0.3 * case.r**-0.5, low).requires_grad_()
        self.upstream = make(case.t, case.n, 1.0, base if case.kind != "autocast" else torch.bfloat16)

    def autocast(self) -> AbstractContextManager[Any]:
        if self.case.kind == "autocast":
            return torch.autocast(self.case.device, torch.bfloat16)
        return nullcontext()

    def forward(self, call: Call) -> Tensor:
        with torch.no_grad(), self.autocast():
            return call(self.x)

    def step(self, call: Call) -> list[Tensor]:
        self.x.grad = self.a.grad = self.b.grad = None
        with self.autocast():
            y = call(self.x)
        y.backward(self.upstream.to(y.dtype))
        return [y.detach(), *(t.grad for t in (self.x, self.a, self.b) if t.grad is not None)]


def peft_layer(layer: Layer) -> Call:
    """peft's own `lora.Linear` on the tensors of the case."""
    from peft import LoraConfig, get_peft_model

    case = layer.case
    base = nn.Linear(case.k, case.n, bias=False, device=case.device, dtype=layer.weight.dtype)
    config = LoraConfig(
        r=case.r, lora_alpha=SCALING * case.r, lora_dropout=case.dropout, target_modules=["0"]
    )
    model: Any = get_peft_model(nn.Sequential(base), config)
    adapted = model.base_model.model[0]
    base.weight.data = layer.weight
    # the leaves themselves, so that their gradients are those that are compared
    adapted.lora_A["default"]._parameters["weight"] = layer.a
    adapted.lora_B["default"]._parameters["weight"] = layer.b
    called: Call = adapted.train()
    return called


def compiled_layer(layer: Layer) -> Call:
    """peft's arithmetic under torch.compile, whole; compiled once, the sizes are dynamic."""
    p = layer.case.dropout

    def formula(x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        dropped = F.dropout(x.to(a.dtype), p) if p else x.to(a.dtype)
        result = F.linear(x, weight)
        return (result + F.linear(F.linear(dropped, a), b) * SCALING).to(result.dtype)

    compiled = torch.compile(formula, fullgraph=True, dynamic=True)
    return lambda x: compiled(x, layer.weight, layer.a, layer.b)


class HandWritten(torch.autograd.Function):
    """unsloth's formulation: updates added by addmm, x Aᵀ made again in the backward pass, no dropout."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        x, weight, a, b = (t.to(dtype) for t in (x, weight, a, b))
        y = x @ weight.t()
        y.addmm_(x @ a.t(), b.t(), alpha=SCALING)
        ctx.save_for_backward(x, weight, a, b)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (dy,) = gradients
        x, weight, a, b = ctx.saved_tensors
        down = dy @ b
        da = (down.t() @ x).mul_(SCALING)
        db = (dy.t() @ (x @ a.t())).mul_(SCALING)
        dx = (dy @ weight).addmm_(down, a, alpha=SCALING)
        return dx, None, da, db


def ours(layer: Layer) -> Call:
    return lambda x: lora_linear(
        x, layer.weight, None, layer.a, layer.b, SCALING, dropout_p=layer.case.dropout
    )


PROVIDERS = Registry()
PROVIDERS.add(Provider("base", lambda layer: lambda x: F.linear(x, layer.weight)))
PROVIDERS.add(Provider("peft", peft_layer, needs=("peft",)))
PROVIDERS.add(Provider("compile", compiled_layer))
PROVIDERS.add(
    Provider("unsloth", lambda layer: lambda x: HandWritten.apply(x, layer.weight, layer.a, layer.b))
)
PROVIDERS.add(Provider("ours", ours, ours=True))


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
        names = [name for name in names if name != "unsloth"]
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
    suite = f"lora{'_dropout' if options.dropout else ''}{options.tag}"
    if not options.no_save:
        print(harness.save(suite, rows, not_measured=reasons))
    faults = [row for row in rows if "ours_not_timed" in row]
    if faults:
        sys.exit(f"our own result is wrong, not timed: {faults}")


if __name__ == "__main__":
    main()
