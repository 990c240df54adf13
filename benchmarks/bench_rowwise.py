"""l2_normalize and segment_mean, forward and backward, against torch.

python -m benchmarks.bench_rowwise --rows 1024 8192 --width 576 2048

"copy_ratio" is the time over that of copying the input once, in the same round. segment_mean pools sequences of
--length rows; torch's peers are segment_reduce, and the mean of a padded tensor, which needs equal lengths.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import harness
from benchmarks.providers import relative_error
from llm2clip_kernels import l2_normalize, segment_mean

ERROR_LIMIT = {"float32": 2e-6, "bfloat16": 2e-2, "float16": 2e-3}


def functions(length: int, edges: Tensor) -> dict[str, dict[str, Callable[[Tensor], Tensor]]]:
    """Operation -> provider -> function of (rows, width); the first provider defines what is right."""
    return {
        "l2_normalize": {
            "torch": lambda x: F.normalize(x, dim=-1),
            "compile": torch.compile(lambda x: F.normalize(x, dim=-1), dynamic=False),
            "ours": l2_normalize,
        },
        "segment_mean": {
            "padded_mean": lambda x: x.view(-1, length, x.shape[-1]).mean(1),
            "segment_reduce": lambda x: torch.segment_reduce(x, "mean", offsets=edges, axis=0),
            "ours": lambda x: segment_mean(x, edges),
        },
        "segment_mean, normalised": {
            "padded_mean": lambda x: F.normalize(x.view(-1, length, x.shape[-1]).mean(1), dim=-1),
            "segment_reduce": lambda x: F.normalize(
                torch.segment_reduce(x, "mean", offsets=edges, axis=0), dim=-1
            ),
            "ours": lambda x: segment_mean(x, edges, normalize=True),
        },
    }


def step_of(function: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], list[Tensor]]:
    """A forward and backward that returns the result and the gradient of x."""
    leaf = x.detach().requires_grad_()
    upstream = torch.randn(function(x).shape, generator=torch.Generator().manual_seed(1)).to(x.device)

    def step() -> list[Tensor]:
        y = function(leaf)
        return [y.detach(), *torch.autograd.grad(y, leaf, upstream.to(y.dtype))]

    return step


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[1024, 8192])
    parser.add_argument("--width", type=int, nargs="+", default=[576, 2048])
    parser.add_argument("--length", type=int, default=64, help="rows of a pooled sequence")
    parser.add_argument("--dtype", default="float32", choices=list(ERROR_LIMIT))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--max-seconds", type=float, default=10.0, help="of one shape and operation")
    parser.add_argument("--no-save", action="store_true", help="print only")
    options = parser.parse_args(arguments)
    device = harness.default_device()
    rows: list[dict[str, Any]] = []
    for width in options.width:
        for count in options.rows:
            count = max(1, count // options.length) * options.length
            x = torch.randn(count, width, generator=torch.Generator().manual_seed(0))
            x = x.to(device, getattr(torch, options.dtype))
            edges = torch.arange(0, count + 1, options.length, device=device)
            for operation, providers in functions(options.length, edges).items():
                shape = {"operation": operation, "rows": count, "width": width, "dtype": options.dtype}
                want = step_of(next(iter(providers.values())), x.double())()
                timed: dict[str, Callable[[], Any]] = {"copy": x.clone}
                errors: dict[str, float] = {}
                for name, function in providers.items():
                    step = step_of(function, x)
                    errors[name] = max(relative_error(g, w) for g, w in zip(step(), want, strict=True))
                    if errors[name] <= ERROR_LIMIT[options.dtype]:
                        timed[name] = step
                    else:
                        rows.append({"provider": name, **shape, "not_timed": f"error {errors[name]:.1e}"})
                times = harness.interleave(
                    timed, rounds=options.rounds, max_seconds=options.max_seconds, device=device
                )
                first = next(iter(providers))
                for name, seconds in times.items():
                    row: dict[str, Any] = {"provider": name, **shape, "rounds": len(seconds)}
                    row |= {key: round(value, 4) for key, value in harness.summarize(seconds).items()}
                    row["copy_ratio"] = round(harness.ratio_to(seconds, times["copy"]), 2)
                    if name != "copy":
                        row["error_vs_fp64"] = float(f"{errors[name]:.1e}")
                        if first in times:
                            row[f"speedup_over_{first}"] = round(harness.ratio_to(times[first], seconds), 2)
                    rows.append(row)
                    print(row, flush=True)
    if not options.no_save:
        print(harness.save(f"rowwise_{options.dtype}", rows))


if __name__ == "__main__":
    main()
