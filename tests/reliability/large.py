"""Every native op where a product of sizes passes 2^31: `python -m tests.reliability.large`.

Pairs of 47,000 rows for the ops over pairs; rows of 2^20 + 5 tokens with 2,048 and more numbers for the others. What
lies beyond 2^31 (the last rows, and the last columns) is compared with a direct computation in fp64. A case that needs
more memory than is free is left out and said to be.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import llm2clip_kernels as kernels
from llm2clip_kernels import native

PAIRS, DIM = 47_000, 4
TOKENS, WIDTH = 2**20 + 5, 2048
SCALE, LAST = 7.0, slice(PAIRS - 8, PAIRS)
assert PAIRS * PAIRS > 2**31 and TOKENS * WIDTH > 2**31


def _unit(seed: int, rows: int = PAIRS) -> Tensor:
    values = torch.randn(rows, DIM, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(values, dim=1)


def _error(got: Tensor, want: Tensor) -> float:
    """Largest difference, relative to the largest wanted value."""
    return float((got.double() - want.double()).abs().max() / want.double().abs().max().clamp_min(1e-30))


def _leaves() -> tuple[Tensor, Tensor]:
    return _unit(0).requires_grad_(), _unit(1).requires_grad_()


def _softmax_error(x: Tensor, y: Tensor, row: Tensor, col: Tensor) -> float:
    """Worst error of the last log-sum-exps, and of the last gradients of their sum, which are in x and y."""
    a, b = x.detach().double(), y.detach().double()
    errors = []
    for one, other, lse, other_lse, gradient in ((a, b, row, col, x.grad), (b, a, col, row, y.grad)):
        assert gradient is not None
        logits = SCALE * one[LAST] @ other.T
        g = (logits - logits.logsumexp(1, keepdim=True)).exp() + (logits - other_lse.detach().double()).exp()
        errors += [
            _error(lse[LAST].detach(), logits.logsumexp(1)),
            _error(gradient[LAST], SCALE * g @ other),
        ]
    return max(errors)


def _lse(method: str) -> float:
    x, y = _leaves()
    row, col = kernels.similarity_lse(x, y, SCALE, method=method)  # type: ignore[arg-type]
    (row.sum() + col.sum()).backward()
    return _softmax_error(x, y, row, col)


def _distill() -> float:
    x, y = _leaves()
    terms = kernels.similarity_distill(x, y, SCALE, _unit(2), _unit(3), 5.0)
    assert terms.col_lse is not None and terms.cross_col is not None
    (terms.row_lse.sum() + terms.col_lse.sum()).backward()
    taught = (5.0 * _unit(2)[LAST].double() @ _unit(3).double().T).softmax(1)
    logits = SCALE * x.detach()[LAST].double() @ y.detach().double().T
    cross = _error(terms.cross_row[LAST].detach(), (taught * logits).sum(1))
    return max(cross, _softmax_error(x, y, terms.row_lse, terms.col_lse))


def _sigmoid() -> float:
    x, y = _leaves()
    kernels.sigmoid_loss(x, y, SCALE, -2.0, reduction="sum").backward()
    assert x.grad is not None
    logits = SCALE * x.detach()[LAST].double() @ y.detach().double().T - 2.0
    g = logits.sigmoid()
    g[torch.arange(8), torch.arange(PAIRS - 8, PAIRS)] -= 1.0
    return _error(x.grad[LAST], SCALE * g @ y.detach().double())


def _rank() -> float:
    x, y = _unit(0), _unit(1)
    rows, cols = kernels.similarity_rank(x, y)
    worst = 0.0
    for one, other, ranks in ((x, y, rows), (y, x, cols)):
        dots = one[LAST].double() @ other.double().T
        own = dots[torch.arange(8), torch.arange(PAIRS - 8, PAIRS)]
        worst = max(worst, float((ranks[LAST] - 1 - (dots > own[:, None]).sum(1)).abs().max()))
    return worst


def _topk() -> float:
    x, y = _unit(0), _unit(1)
    values, places = kernels.similarity_topk(x, y, 5)
    want = (x[LAST].double() @ y.double().T).topk(5)
    return max(_error(values[LAST], want.values), float((places[LAST] != want.indices).sum()))


def _tokens() -> Tensor:
    """(TOKENS, WIDTH) bf16, made in place; no shift or scale makes one row of another."""
    values = torch.empty(TOKENS, WIDTH, dtype=torch.bfloat16)
    one, other = (torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    for start in range(0, TOKENS, 4096):
        stop = min(start + 4096, TOKENS)
        values[start:stop] = one + (torch.arange(start, stop)[:, None] % 997) / 997 * other
    return values


def _normalize() -> float:
    x = _tokens()
    return _error(kernels.l2_normalize(x)[-3:], torch.nn.functional.normalize(x[-3:].double(), dim=1))


def _segments() -> float:
    x, edges = _tokens(), torch.tensor([0, TOKENS - 40, TOKENS - 7, TOKENS])
    return _error(kernels.segment_mean(x, edges)[-1], x[-7:].double().mean(0))


def _layer_norm() -> float:
    x, weight, bias = _tokens(), torch.rand(WIDTH), torch.rand(WIDTH)
    got = torch.ops.llm2clip_native.layer_norm(x, weight, bias, 1e-5, True)
    want = torch.nn.functional.layer_norm(x[-3:].double(), (WIDTH,), weight.double(), bias.double(), 1e-5)
    return _error(got[-3:], want)


def _attention() -> float:
    heads, width, tokens = 64, 64, 2**19 + 5
    q = torch.empty(tokens, heads, width).fill_(0.25)
    q[-5:] = torch.randn(5, heads, width, generator=torch.Generator().manual_seed(0))
    k, v = (torch.randn(tokens, 1, width, generator=torch.Generator().manual_seed(n)) for n in (1, 2))
    edges = torch.cat([torch.arange(0, tokens - 5, 8), torch.tensor([tokens - 5, tokens])])
    got = kernels.packed_attention(q, k, v, edges, 8, causal=False)[-5:].double()
    scores = torch.einsum("thw,sw->hts", q[-5:].double(), k[-5:, 0].double()) / width**0.5
    return _error(got, torch.einsum("hts,sw->thw", scores.softmax(-1), v[-5:, 0].double()))


@dataclass(frozen=True)
class Case:
    """One op beyond 2^31: how to run it, the memory it takes, and the error that rounding allows."""

    run: Callable[[], float]
    gib: float
    limit: float


CASES = {
    "similarity_lse, recompute": Case(lambda: _lse("recompute"), 1, 1e-4),
    "similarity_lse, cached": Case(lambda: _lse("cached"), 10, 1e-4),
    "similarity_distill": Case(_distill, 1, 1e-4),
    "sigmoid_loss": Case(_sigmoid, 1, 1e-4),
    "similarity_rank": Case(_rank, 1, 0.0),
    "similarity_topk": Case(_topk, 1, 1e-6),
    "l2_normalize": Case(_normalize, 9, 1e-2),
    "segment_mean": Case(_segments, 5, 1e-2),
    "layer_norm": Case(_layer_norm, 9, 1e-2),
    "packed_attention": Case(_attention, 18, 1e-5),
}


def free_gib() -> float:
    """Memory that can be had without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) / 2**20
    return 0.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; the status is 1 where a result is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", help="names; default: all")
    parser.add_argument("--out", default="", help="JSON file for the result")
    chosen = parser.parse_args(arguments)
    if reason := native.load():
        sys.exit(f"the native library is {reason}")
    result: dict[str, dict[str, object]] = {}
    for name in chosen.cases or CASES:
        case, start = CASES[name], time.monotonic()
        if free_gib() < case.gib:
            result[name] = {"left_out": f"{case.gib} GiB needed, {free_gib():.1f} are free"}
        else:
            error = case.run()
            right = error <= case.limit
            result[name] = {"right": right, "error": error, "seconds": round(time.monotonic() - start, 1)}
        print(json.dumps({name: result[name]}), flush=True)
    if chosen.out:
        Path(chosen.out).write_text(json.dumps(result, indent=2) + "\n")
    return int(any(entry.get("right") is False for entry in result.values()))


if __name__ == "__main__":
    sys.exit(main())
