"""The symmetric contrastive loss, forward and backward: ours against eager torch and one plain matmul.

python -m benchmarks.bench_similarity --n 8192 --d 512 --rounds 5

"passes" is the time over that of one torch.mm of the same N·N·D in the same round.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import harness
from llm2clip_kernels import infonce_loss

SCALE = 1 / 0.07
# a provider further than this from fp64 is wrong, and its speed is not printed
ERROR_LIMIT = {"float32": 1e-5, "bfloat16": 3e-2, "float16": 1e-2}


def eager(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """open_clip's ClipLoss on one device: two matmuls, two cross-entropies, both matrices kept."""
    target = torch.arange(len(x), device=x.device)
    per_x, per_y = scale * x @ y.T, scale * y @ x.T
    return 0.5 * (F.cross_entropy(per_x.float(), target) + F.cross_entropy(per_y.float(), target))


LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "eager": eager,
    "recompute": lambda x, y, s: infonce_loss(x, y, s, method="recompute"),
    "cached": lambda x, y, s: infonce_loss(x, y, s, method="cached"),
}


def inputs(n: int, d: int, dtype: str, kind: str) -> list[Tensor]:
    """x, y (n, d) unit norm and the scale, as leaves; "trained": correlated positives, a shared mean."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, d, generator=generator) for _ in range(2))
    if kind == "trained":
        y = x + y + 0.5 * torch.randn(1, d, generator=generator)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pair = [F.normalize(t, dim=1).to(device, getattr(torch, dtype)).requires_grad_() for t in (x, y)]
    return [*pair, torch.tensor(SCALE, device=device, requires_grad=True)]


def step(name: str, leaves: list[Tensor]) -> list[Tensor]:
    """One forward and backward; returns the loss and the gradients."""
    for leaf in leaves:
        leaf.grad = None
    loss = LOSSES[name](leaves[0], leaves[1], leaves[2])
    loss.backward()
    return [loss.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def relative_error(name: str, d: int, dtype: str, kind: str) -> float:
    """The largest relative error of loss and gradients against fp64, on 1000 pairs."""
    leaves = inputs(1000, d, dtype, kind)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    want = step("eager_fp64", exact)
    got = step(name, leaves)
    return max(((g.double() - w).norm() / w.norm()).item() for g, w in zip(got, want, strict=True))


def _eager_fp64(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    logits, target = scale * x @ y.T, torch.arange(len(x), device=x.device)
    return 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))


LOSSES["eager_fp64"] = _eager_fp64


def memory_setup(name: str, n: int, d: int, dtype: str) -> Callable[[], Any]:
    """What `harness.peak_mib` measures: one step above inputs, gradients and libraries already loaded."""
    step(name, inputs(256, d, dtype, "random"))
    leaves = inputs(n, d, dtype, "random")
    # room for the gradients, touched so that it is resident before the measurement begins
    for leaf in leaves:
        leaf.grad = torch.ones_like(leaf)
    return lambda: step(name, leaves)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--d", type=int, nargs="+", default=[512])
    parser.add_argument("--dtype", default="float32", choices=list(ERROR_LIMIT))
    parser.add_argument("--kind", default="random", choices=["random", "trained"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--providers", nargs="+", default=["eager", "recompute", "cached"])
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    parser.add_argument("--no-save", action="store_true", help="print only")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for d in options.d:
        errors = {p: relative_error(p, d, options.dtype, options.kind) for p in options.providers}
        wrong = [p for p, error in errors.items() if not error <= ERROR_LIMIT[options.dtype]]
        if wrong:
            raise SystemExit(f"wrong results, not timed: { {p: errors[p] for p in wrong} }")
        for n in options.n:
            leaves = inputs(n, d, options.dtype, options.kind)
            x, y = (leaf.detach() for leaf in leaves[:2])
            timed: dict[str, Callable[[], Any]] = {"mm": lambda x=x, y=y: x @ y.T}  # type: ignore[misc]
            for p in options.providers:
                timed[p] = lambda p=p, leaves=leaves: step(p, leaves)  # type: ignore[misc]
            times = harness.interleave(timed, rounds=options.rounds)
            for p in timed:
                row: dict[str, Any] = {
                    "provider": p,
                    "n": n,
                    "d": d,
                    "dtype": options.dtype,
                    "inputs": options.kind,
                }
                row |= {key: round(value, 3) for key, value in harness.summarize(times[p]).items()}
                row["passes"] = round(harness.ratio_to(times[p], times["mm"]), 3)
                # 4 useful passes whatever the provider really did
                passes = 1 if p == "mm" else 4
                row["effective_gflops"] = round(passes * 2 * n * n * d / row["median_ms"] / 1e6, 1)
                if p != "mm":
                    row["error_vs_fp64"] = f"{errors[p]:.1e}"
                    if "eager" in times:
                        row["speedup_over_eager"] = round(harness.ratio_to(times["eager"], times[p]), 2)
                    if not options.no_memory and not torch.cuda.is_available():
                        row["peak_mib"] = round(harness.peak_mib(memory_setup, p, n, d, options.dtype), 1)
                rows.append(row)
                print(row, flush=True)
    if not options.no_save:
        print(harness.save(f"similarity_{options.dtype}_{options.kind}", rows))


if __name__ == "__main__":
    main()
