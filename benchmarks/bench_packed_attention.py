"""Attention over sequences of different lengths, forward and backward: ours against what torch offers.

python -m benchmarks.bench_packed_attention --tokens 1024 --heads 9 3 --width 64

`padded`: scaled_dot_product_attention over one dense batch with a mask. `per_sequence`: one call per sequence.
`jagged`: nested tensors. `buckets`: ours in plain torch. `packed_attention`: what the op picks. Lengths are drawn
like those of captions. Results are compared with the dense reference in fp64 before anything is timed.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import harness
from llm2clip_kernels import packed_attention
from llm2clip_kernels.packed_attention import packed_attention_reference

ERROR_LIMIT = {"float32": 1e-5, "bfloat16": 3e-2}
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def lengths_of(tokens: int, shape: str) -> list[int]:
    """Lengths of a pack: equal, like captions that follow each other by length, or of any caption."""
    drawn = np.random.default_rng(0).lognormal(3.7, 0.75, 4096).clip(3, 400).astype(int)
    if shape == "sorted":
        drawn = np.sort(drawn)[len(drawn) // 2 :]
    elif shape == "equal":
        drawn = np.full(4096, 60)
    found: list[int] = []
    while sum(found) + drawn[len(found)] <= tokens:
        found.append(int(drawn[len(found)]))
    return sorted(found, reverse=True)


def dense(x: Tensor, lengths: list[int]) -> Tensor:
    """(T, H, D) -> (B, H, L, D), zeros behind each sequence."""
    return torch.nn.utils.rnn.pad_sequence(list(x.split(lengths)), batch_first=True).transpose(1, 2)


def providers(lengths: list[int], causal: bool, device: str) -> dict[str, Attend]:
    """Name -> attention of q (T, Hq, D), k and v (T, Hk, D)."""
    edges = torch.tensor([0, *np.cumsum(lengths).tolist()], device=device, dtype=torch.int32)
    longest = max(lengths)
    real = torch.arange(longest, device=device) < torch.tensor(lengths, device=device)[:, None]
    mask = real[:, None, None, :] & (
        torch.ones(longest, longest, dtype=torch.bool, device=device).tril() if causal else True
    )

    def repeat(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        group = q.shape[1] // k.shape[1]
        return k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)

    def padded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = repeat(q, k, v)
        out = F.scaled_dot_product_attention(*(dense(t, lengths) for t in (q, k, v)), attn_mask=mask)
        return out.transpose(1, 2)[real]

    def per_sequence(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = zip(*(t.transpose(0, 1).split(lengths, dim=1) for t in (q, k, v)), strict=True)
        done = [
            F.scaled_dot_product_attention(
                *(t[None] for t in part), is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
            )[0]
            for part in parts
        ]
        return torch.cat(done, dim=1).transpose(0, 1)

    def jagged(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = repeat(q, k, v)
        nested = [
            torch.nested.nested_tensor_from_jagged(t, edges, max_seqlen=longest).transpose(1, 2)
            for t in (q, k, v)
        ]
        return F.scaled_dot_product_attention(*nested, is_causal=causal).transpose(1, 2).values()

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return packed_attention(q, k, v, edges, longest, causal=causal)

    def buckets(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with _backend("chunked"):
            return packed_attention(q, k, v, edges, longest, causal=causal)

    found: dict[str, Attend] = {"padded": padded, "per_sequence": per_sequence}
    found |= {"jagged": jagged, "buckets": buckets, "packed_attention": ours}
    return found


@contextmanager
def _backend(name: str) -> Iterator[None]:
    before = os.environ.get("LLM2CLIP_BACKEND")
    os.environ["LLM2CLIP_BACKEND"] = name
    try:
        yield
    finally:
        os.environ.pop("LLM2CLIP_BACKEND")
        if before is not None:
            os.environ["LLM2CLIP_BACKEND"] = before


def step(name: str, attend: Attend, leaves: list[Tensor], grad: Tensor) -> list[Tensor]:
    """Output and gradients."""
    out = attend(*leaves)
    # the backward picks its implementation anew
    with _backend("chunked" if name == "buckets" else "auto"):
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def forward(attend: Attend, leaves: list[Tensor]) -> Tensor:
    """Output without a graph."""
    with torch.no_grad():
        return attend(*leaves)


def measure(shape: str, causal: bool, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of one kind of pack."""
    lengths = lengths_of(options.tokens, shape)
    tokens, (query_heads, key_heads) = sum(lengths), options.heads
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    shapes = [(tokens, h, options.width) for h in (query_heads, key_heads, key_heads)]
    leaves = [torch.randn(s, dtype=dtype, device=options.device).requires_grad_() for s in shapes]
    grad = torch.randn(shapes[0], dtype=dtype, device=options.device)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    edges = torch.tensor([0, *np.cumsum(lengths).tolist()], device=options.device)
    want_out = packed_attention_reference(*exact, edges, causal=causal)
    want = [want_out.detach(), *torch.autograd.grad(want_out, exact, grad.double())]
    timed: dict[str, Attend] = {}
    errors, rows = {}, []
    for name, attend in providers(lengths, causal, options.device).items():
        try:
            got = step(name, attend, leaves, grad)
        except (NotImplementedError, RuntimeError) as error:
            print(f"not measured: {name}: {str(error).splitlines()[0][:100]}", flush=True)
            continue
        errors[name] = max(
            ((g.double() - w).norm() / w.norm()).item() for g, w in zip(got, want, strict=True)
        )
        timed[name] = attend
    wrong = {name: error for name, error in errors.items() if not error <= ERROR_LIMIT[options.dtype]}
    if wrong:
        sys.exit(f"wrong results, not timed: {wrong}")
    for phase in ("forward", "forward_backward"):
        functions: dict[str, Callable[[], Any]] = {
            name: (
                (lambda a=attend: forward(a, leaves))
                if phase == "forward"
                else (lambda n=name, a=attend: step(n, a, leaves, grad))
            )
            for name, attend in timed.items()
        }
        times = harness.interleave(functions, rounds=options.rounds, device=options.device)
        for name in timed:
            row: dict[str, Any] = {"provider": name, "phase": phase, "pack": shape, "causal": causal}
            row |= {"tokens": tokens, "sequences": len(lengths), "dtype": options.dtype}
            row |= {key: round(value, 3) for key, value in harness.summarize(times[name]).items()}
            row["speedup_over_padded"] = round(1 / harness.ratio_to(times[name], times["padded"]), 2)
            row["speedup_over_per_sequence"] = round(
                1 / harness.ratio_to(times[name], times["per_sequence"]), 2
            )
            row["error_vs_fp64"] = f"{errors[name]:.1e}"
            rows.append(row)
            print(row, flush=True)
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--heads", type=int, nargs=2, default=[9, 3], help="query and key heads")
    parser.add_argument("--width", type=int, default=64, help="head size")
    parser.add_argument("--dtype", default="float32", choices=list(ERROR_LIMIT))
    parser.add_argument("--device", default=harness.default_device(), choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--packs", nargs="+", default=["equal", "sorted", "any"])
    parser.add_argument("--no-save", action="store_true", help="print only")
    options = parser.parse_args(arguments)
    rows = []
    for shape in options.packs:
        for causal in (False, True):
            rows += measure(shape, causal, options)
    if not options.no_save:
        print(harness.save(f"packed_attention_{options.dtype}", rows))


if __name__ == "__main__":
    main()
