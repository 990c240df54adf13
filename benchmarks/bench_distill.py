"""Contrastive and distillation loss together, forward and backward: ours against the definition and open_clip's.

python -m benchmarks.bench_distill --n 2048 8192 --d 512 --e 768

The least work is four products of the student's shape (forward, again, two gradients) and two of the teacher's;
"gemm_percent" is the share of the speed of these six as plain torch.mm in the same round, whatever a provider really
did. Providers that cannot run here, or whose result is wrong, are named with the reason and without a speed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import harness
from llm2clip_kernels import distill_loss

SCALE, TEACHER_SCALE = 1 / 0.07, 50.0
# a provider further than this from fp64 is wrong, and its speed is not printed
ERROR_LIMIT = {"float32": 5e-5, "bfloat16": 5e-2, "float16": 1e-2}
CHECK_PAIRS = 2048
Leaves = list[Tensor]
Step = Callable[[Leaves], Sequence[Tensor]]
Loss = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Case:
    """N pairs of D features of a student and E of a teacher, dtype by name, device by name."""

    n: int
    d: int
    e: int
    dtype: str = "float32"
    device: str = "cpu"


def inputs(case: Case) -> Leaves:
    """x, y (n, d) and the scale as leaves, then p, q (n, e): unit norm, positives correlated."""
    generator = torch.Generator(case.device).manual_seed(0)

    def pair(dim: int) -> list[Tensor]:
        x, y = (torch.randn(case.n, dim, generator=generator, device=case.device) for _ in range(2))
        return [F.normalize(t, dim=1).to(getattr(torch, case.dtype)) for t in (x, 0.5 * x + y)]

    student = [t.requires_grad_() for t in pair(case.d)]
    return [*student, torch.tensor(SCALE, device=case.device, requires_grad=True), *pair(case.e)]


def definition(x: Tensor, y: Tensor, scale: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """open_clip's, on one process: two products and two softmaxes of either model."""
    student = scale * x @ y.T, scale * y @ x.T
    teacher = TEACHER_SCALE * p @ q.T, TEACHER_SCALE * q @ p.T
    target = torch.arange(len(x), device=x.device)
    contrastive = sum(F.cross_entropy(s.float(), target) for s in student)
    distill = -sum(
        (t.float().softmax(1) * s.float().log_softmax(1)).sum(1).mean()
        for t, s in zip(teacher, student, strict=True)
    )
    return 0.5 * contrastive, 0.5 * distill


def _exact(x: Tensor, y: Tensor, scale: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    logits, taught = scale * x @ y.T, TEACHER_SCALE * p @ q.T
    target = torch.arange(len(x), device=x.device)
    contrastive = F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)
    distill = -(taught.softmax(1) * logits.log_softmax(1) + taught.softmax(0) * logits.log_softmax(0)).sum()
    return 0.5 * contrastive, 0.5 * distill / len(x)


def _by_autograd(loss: Loss) -> Step:
    def step(leaves: Leaves) -> list[Tensor]:
        for leaf in leaves[:3]:
            leaf.grad = None
        contrastive, distill = loss(*leaves)
        (contrastive + distill).backward()
        gradients = [leaf.grad for leaf in leaves[:3] if leaf.grad is not None]
        return [contrastive.detach(), distill.detach(), *gradients]

    return step


def _ours(x: Tensor, y: Tensor, scale: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    return distill_loss(x, y, scale, p, q, TEACHER_SCALE)


@contextmanager
def _forced_backend(name: str) -> Iterator[None]:
    before = os.environ.get("LLM2CLIP_BACKEND")
    os.environ["LLM2CLIP_BACKEND"] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ["LLM2CLIP_BACKEND"]
        else:
            os.environ["LLM2CLIP_BACKEND"] = before


def _chunked() -> Step:
    inner = _by_autograd(_ours)

    def step(leaves: Leaves) -> Sequence[Tensor]:
        with _forced_backend("chunked"):
            return inner(leaves)

    return step


def _open_clip() -> Step:
    from open_clip.loss import DistillClipLoss

    module = DistillClipLoss()

    def loss(x: Tensor, y: Tensor, scale: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(x.device.type, dtype=x.dtype, enabled=x.dtype != torch.float32):
            contrastive, distill = module(x, y, scale, p, q, TEACHER_SCALE)
        return contrastive, distill

    return _by_autograd(loss)


PROVIDERS = harness.Registry()
for _provider in (
    harness.Provider("eager", lambda: _by_autograd(definition)),
    harness.Provider("compile", lambda: _by_autograd(torch.compile(definition, dynamic=False))),
    harness.Provider("open_clip", _open_clip, needs=("open_clip",)),
    harness.Provider("chunked", _chunked, ours=True),
    harness.Provider("fused", lambda: _by_autograd(_ours), ours=True),
):
    PROVIDERS.add(_provider)


def errors(name: str, case: Case) -> dict[str, float]:
    """Errors against fp64: both losses relative, or absolute below 1; the larger relative one of dx and dy; dscale."""
    leaves = inputs(replace(case, n=min(case.n, CHECK_PAIRS)))
    wide = [t.detach().double().requires_grad_(i < 3) for i, t in enumerate(leaves)]
    want = _by_autograd(_exact)(wide)
    got = PROVIDERS[name].make()(leaves)
    found = {
        key: abs(float(g) - float(w)) / max(1.0, abs(float(w)))
        for key, g, w in zip(("contrastive", "distill"), got, want, strict=False)
    }
    both = [harness.relative_error(g, w) for g, w in zip(got[2:4], want[2:4], strict=True)]
    # max() would drop a NaN that comes second
    found["gradients"] = float(torch.tensor(both, dtype=torch.float64).amax())
    found["scale"] = abs(float(got[4]) - float(want[4]))
    return found


def memory_setup(name: str, case: Case) -> Callable[[], Any]:
    """What `harness.peak_mib` measures: one step above inputs, gradients and libraries already loaded."""
    step = PROVIDERS[name].make()
    leaves = inputs(case)
    # what a first call loads or compiles is no memory of the loss; a compiled step is compiled for its shape
    step(leaves if name == "compile" else inputs(replace(case, n=256)))
    for leaf in leaves[:3]:
        leaf.grad = torch.ones_like(leaf)
    return lambda: step(leaves)


def measure(case: Case, names: list[str], options: argparse.Namespace) -> list[dict[str, Any]]:
    """One interleaved run of all providers at one shape; returns its rows."""
    shape = {"n": case.n, "d": case.d, "e": case.e, "dtype": case.dtype}
    found = {name: errors(name, case) for name in names}
    reasons = {name: harness.wrong(found[name], ERROR_LIMIT[case.dtype]) for name in names}
    rows: list[dict[str, Any]] = [
        {"provider": name, **shape, "not_timed": f"wrong result: {reason}"}
        for name, reason in reasons.items()
        if reason
    ]
    names = [name for name in names if not reasons[name]]
    leaves = inputs(case)
    x, y, _, p, q = (t.detach() for t in leaves)
    timed: dict[str, Callable[[], Any]] = {"mm_student": lambda: x @ y.T, "mm_teacher": lambda: p @ q.T}
    for name in names:
        step = PROVIDERS[name].make()
        timed[name] = lambda step=step: step(leaves)  # type: ignore[misc]
    times = harness.interleave(
        timed, rounds=options.rounds, max_seconds=options.max_seconds, device=case.device
    )
    least = [4 * s + 2 * t for s, t in zip(times["mm_student"], times["mm_teacher"], strict=True)]
    for name in names:
        seconds = times[name]
        row: dict[str, Any] = {"provider": name, **shape, "rounds": len(seconds)}
        row |= {key: round(value, 3) for key, value in harness.summarize(seconds).items()}
        row["gemm_percent"] = round(100 * harness.ratio_to(least, seconds), 1)
        row["effective_gflops"] = round(
            2 * case.n**2 * (4 * case.d + 2 * case.e) / statistics.median(seconds) / 1e9, 1
        )
        if "eager" in names:
            row["speedup_over_eager"] = round(harness.ratio_to(times["eager"], seconds), 2)
        row |= {f"error_{key}": float(f"{error:.1e}") for key, error in found[name].items()}
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
    parser.add_argument("--d", type=int, default=512, help="features of the student")
    parser.add_argument("--e", type=int, default=768, help="features of the teacher")
    parser.add_argument("--dtype", default="float32", choices=list(ERROR_LIMIT))
    parser.add_argument("--device", default=harness.default_device(), choices=["cpu", "cuda"])
    parser.add_argument("--providers", nargs="+", default=list(PROVIDERS.providers))
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds")
    parser.add_argument("--max-seconds", type=float, default=60.0, help="fewer rounds after so much")
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    parser.add_argument("--no-save", action="store_true", help="print only")
    options = parser.parse_args(arguments)
    usable, reasons = PROVIDERS.choose(options.providers, options.device)
    for reason in reasons.items():
        print("not measured: {}: {}".format(*reason), flush=True)
    names = [provider.name for provider in usable]
    rows: list[dict[str, Any]] = []
    for n in options.n:
        rows += measure(Case(n, options.d, options.e, options.dtype, options.device), names, options)
    if not options.no_save:
        print(harness.save(f"distill_{options.dtype}", rows, not_measured=reasons))
    faults = [row for row in rows if "not_timed" in row and PROVIDERS[row["provider"]].ours]
    if faults:
        sys.exit(f"our own result is wrong, not timed: {faults}")


if __name__ == "__main__":
    main()
