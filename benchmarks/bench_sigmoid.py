"""The sigmoid loss (SigLIP), forward and backward: ours against eager torch, open_clip and one plain matmul.

python -m benchmarks.bench_sigmoid --n 2048 8192 --d 512

"passes" is the time over that of one torch.mm of the same N·N·D in the same round; the loss by definition takes 3.
"gemm_percent" is the share of the speed of that product into memory that exists already (`mm_out`), at 3 useful
passes whatever a provider really did. Providers that cannot run here, or whose result is wrong, are named with the
reason and without a speed. "rows" is reduction="none", which takes a fourth pass; "value" makes no gradients.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import harness
from benchmarks.contrastive import Case, inputs
from benchmarks.providers import Provider, Registry, relative_error
from llm2clip_kernels import sigmoid_loss

# SigLIP's first values (arXiv 2303.15343, section 3.3)
SCALE, BIAS = 10.0, -10.0
USEFUL_PASSES = 3
# a provider further than this from fp64 is wrong, and its speed is not printed
ERROR_LIMIT = {"float32": 5e-5, "bfloat16": 5e-2, "float16": 1e-2}
# the largest N at which fp64 takes seconds; larger cases are checked at this one
CHECK_PAIRS = {"cpu": 4096, "cuda": 32768}

Step = Callable[[list[Tensor]], Sequence[Tensor | None]]
Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def leaves_of(case: Case) -> list[Tensor]:
    """x, y (n, d) unit norm, scale and bias, as leaves."""
    x, y, scale = inputs(case)
    bias = torch.full_like(scale, BIAS).requires_grad_()
    return [x, y, torch.full_like(scale, SCALE).requires_grad_(), bias]


def exact(leaves: Sequence[Tensor], rows: int = 1024) -> list[Tensor]:
    """Loss and gradients in fp64, from the definition, by stripes of `rows` rows."""
    x, y, scale, bias = (t.detach().double() for t in leaves)
    n = len(x)
    loss, dscale, dbias = (x.new_zeros(()) for _ in range(3))
    dx, dy = torch.empty_like(x), torch.zeros_like(y)
    for start in range(0, n, rows):
        mine = x[start : start + rows]
        dots = mine @ y.T
        label = -torch.ones_like(dots)
        label.diagonal(start).fill_(1)
        logits = label * (scale * dots + bias)
        loss -= F.logsigmoid(logits).sum() / n
        weights = -label * torch.sigmoid(-logits) / n
        dscale += (weights * dots).sum()
        dbias += weights.sum()
        dx[start : start + rows] = scale * weights @ y
        dy += scale * weights.T @ mine
    return [loss, dx, dy, dscale, dbias]


def errors(got: Sequence[Tensor | None], want: Sequence[Tensor]) -> dict[str, float]:
    """Relative errors of what a provider returned: the loss, the gradients of x and y, of scale and bias."""
    names = ("loss", "gradients", "gradients", "scale", "bias")
    found: dict[str, float] = {}
    for name, g, w in zip(names, got, want, strict=True):
        if g is not None:
            error = relative_error(g, w)
            # not max(), which would drop a NaN
            found[name] = error if not error <= found.get(name, 0.0) else found[name]
    return found


def _by_autograd(loss: Loss) -> Step:
    def step(leaves: list[Tensor]) -> list[Tensor | None]:
        for leaf in leaves:
            leaf.grad = None
        value = loss(leaves[0], leaves[1], leaves[2], leaves[3])
        value.backward()
        return [value.detach(), *(leaf.grad for leaf in leaves)]

    return step


def eager_loss(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """One matmul and a log-sigmoid in fp32, logits and labels kept for the backward."""
    label = 2 * torch.eye(len(x), device=x.device) - 1
    return -F.logsigmoid(label * (scale * x @ y.T + bias).float()).sum() / len(x)


def _open_clip(case: Case) -> Step:
    from open_clip.loss import SigLipLoss

    loss = SigLipLoss()

    def run(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        # as its trainer calls it: half precision through autocast
        with torch.autocast(x.device.type, dtype=x.dtype, enabled=x.dtype != torch.float32):
            return loss(x, y, scale, bias)

    return _by_autograd(run)


def _value(case: Case) -> Step:
    def step(leaves: list[Tensor]) -> list[Tensor | None]:
        with torch.no_grad():
            return [sigmoid_loss(leaves[0], leaves[1], leaves[2], leaves[3]), None, None, None, None]

    return step


PROVIDERS = Registry()
for _provider in (
    Provider("eager", lambda case: _by_autograd(eager_loss)),
    Provider("compile", lambda case: _by_autograd(torch.compile(eager_loss, dynamic=False))),
    Provider("open_clip", _open_clip, needs=("open_clip",)),
    Provider("ours", lambda case: _by_autograd(sigmoid_loss), ours=True),
    Provider(
        "rows",
        lambda case: _by_autograd(lambda *leaves: sigmoid_loss(*leaves, reduction="none").mean()),
        ours=True,
    ),
    Provider("value", _value, ours=True),
):
    PROVIDERS.add(_provider)


def check(case: Case, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Errors against fp64 by provider, at the case's own shape or the largest that fp64 serves."""
    small = Case(min(case.n, CHECK_PAIRS[case.device]), case.d, case.dtype, case.kind, case.device)
    leaves = leaves_of(small)
    want = exact(leaves)
    return {name: errors(PROVIDERS[name].make(small)(leaves), want) for name in names}


def memory_setup(name: str, case: Case) -> Callable[[], Any]:
    """What `harness.peak_mib` measures: one step above inputs, gradients and libraries already loaded."""
    step = PROVIDERS[name].make(case)
    leaves = leaves_of(case)
    # what a first call loads or compiles is no memory of the loss; a compiled step is compiled for its shape
    small = Case(256, case.d, case.dtype, case.kind, case.device)
    step(leaves if name == "compile" else leaves_of(small))
    # room for the gradients, touched so that it is resident before the measurement begins
    for leaf in leaves:
        leaf.grad = torch.ones_like(leaf)
    return lambda: step(leaves)


def measure(case: Case, names: Sequence[str], options: argparse.Namespace) -> list[dict[str, Any]]:
    """One interleaved run of all providers at one shape; returns its rows."""
    shape = {"n": case.n, "d": case.d, "dtype": case.dtype, "inputs": case.kind}
    found = check(case, names)
    reasons = {name: harness.wrong(found[name], ERROR_LIMIT[case.dtype]) for name in names}
    rows: list[dict[str, Any]] = [
        {"provider": name, **shape, "not_timed": f"wrong result: {reason}"}
        for name, reason in reasons.items()
        if reason
    ]
    leaves = leaves_of(case)
    x, y = leaves[0].detach(), leaves[1].detach()
    out = x.new_empty(len(x), len(y))
    timed: dict[str, Callable[[], Any]] = {"mm": lambda: x @ y.T, "mm_out": lambda: torch.mm(x, y.T, out=out)}
    for name in names:
        if not reasons[name]:
            step = PROVIDERS[name].make(case)
            timed[name] = lambda step=step: step(leaves)  # type: ignore[misc]
    times = harness.interleave(
        timed, rounds=options.rounds, max_seconds=options.max_seconds, device=case.device
    )
    for name, seconds in times.items():
        row: dict[str, Any] = {"provider": name, **shape, "rounds": len(seconds)}
        row |= {key: round(value, 3) for key, value in harness.summarize(seconds).items()}
        useful = {"mm": 1, "mm_out": 1, "value": 1}.get(name, USEFUL_PASSES)
        row["passes"] = round(harness.ratio_to(seconds, times["mm"]), 3)
        row["gemm_percent"] = round(100 * useful * harness.ratio_to(times["mm_out"], seconds), 1)
        row["effective_gflops"] = round(useful * 2 * case.n**2 * case.d / row["median_ms"] / 1e6, 1)
        if name in names:
            row |= {f"error_{key}": float(f"{error:.1e}") for key, error in found[name].items()}
            if "eager" in times:
                row["speedup_over_eager"] = round(harness.ratio_to(times["eager"], seconds), 2)
            if not options.no_memory:
                row["peak_mib"] = round(harness.peak_mib(memory_setup, name, case, device=case.device), 1)
        rows.append(row)
        print(row, flush=True)
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", type=int, nargs="+", default=[2048, 8192], help="pairs")
    parser.add_argument("--d", type=int, nargs="+", default=[512], help="features")
    parser.add_argument("--dtype", default="float32", choices=list(ERROR_LIMIT))
    parser.add_argument("--kind", default="random", choices=["random", "trained"])
    parser.add_argument("--device", default=harness.default_device(), choices=["cpu", "cuda"])
    parser.add_argument(
        "--providers",
        nargs="+",
        default=["eager", "open_clip", "ours", "rows", "value"],
        help=f"of {', '.join(PROVIDERS.providers)}",
    )
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds at least")
    parser.add_argument("--max-seconds", type=float, default=60.0, help="fewer rounds after so much")
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    parser.add_argument("--no-save", action="store_true", help="print only")
    options = parser.parse_args(arguments)
    usable, reasons = PROVIDERS.choose(options.providers, options.device)
    for reason in reasons.items():
        print("not measured: {}: {}".format(*reason), flush=True)
    rows: list[dict[str, Any]] = []
    for d in options.d:
        for n in options.n:
            case = Case(n, d, options.dtype, options.kind, options.device)
            rows += measure(case, [provider.name for provider in usable], options)
    if not options.no_save:
        print(harness.save(f"sigmoid_{options.dtype}_{options.kind}", rows, not_measured=reasons))
    faults = [row for row in rows if "not_timed" in row and PROVIDERS[row["provider"]].ours]
    if faults:
        sys.exit(f"our own result is wrong, not timed: {faults}")


if __name__ == "__main__":
    main()
