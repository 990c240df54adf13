"""Is bf16 faster than fp32 on this processor? What `run.precision: auto` rests on.

python -m benchmarks.bench_bf16

Frozen linear layers of SmolLM2-135M and of larger models, a transformer layer and the EfficientNet-Lite0 tower
(where its package is installed), each in fp32 and under autocast to bf16: forward alone, and forward with backward.
"bf16_gain" is fp32's time over bf16's in the same round: above 1, bf16 is faster. "auto" is what that setting takes
for the module. The run fails where its choice makes a step slower by more than a tenth.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import harness
from llm2clip.training.faster_precision import faster_precision

LINEAR = ("576x576", "576x1536", "1536x576", "2048x2048")
# bf16 products keep 8 bits of the operands; further away something else went wrong
ERROR_LIMIT = 3e-2
# a gain between 1 / 1.1 and 1.1 may be noise
CLEAR = 1.1


def workloads(rows: int, device: str) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """Name, module and input of what is measured."""
    torch.manual_seed(0)
    for shape in LINEAR:
        k, n = map(int, shape.split("x"))
        layer = nn.Linear(k, n, bias=False, device=device).requires_grad_(False)
        # as in LoRA: the base weight is frozen and the gradient goes through
        yield f"linear {shape}", layer, torch.randn(rows, k, device=device, requires_grad=True)
    block = nn.TransformerEncoderLayer(
        512, 8, 2048, dropout=0.0, activation="gelu", batch_first=True, norm_first=True, device=device
    )
    yield "transformer layer", block, torch.randn(max(1, rows // 64), 64, 512, device=device)
    if importlib.util.find_spec("efficientnet_lite_pytorch") is not None:
        from llm2clip.models.efficientnet import EfficientNetLite0

        tower = EfficientNetLite0(128, pretrained=False, frozen_norm=True).to(device)
        yield "efficientnet-lite0", tower, torch.randn(max(1, rows // 64), 3, 128, 128, device=device)


def precision(name: str, device: str) -> AbstractContextManager[Any]:
    return torch.autocast(device, torch.bfloat16) if name == "bf16" else nullcontext()


def measure(
    name: str, module: nn.Module, x: Tensor, device: str, options: argparse.Namespace
) -> dict[str, Any]:
    """One row: times of both precisions and the gain, forward and with backward."""
    leaves = [t for t in (x, *module.parameters()) if t.requires_grad]

    def forward(kind: str) -> Tensor:
        with torch.no_grad(), precision(kind, device):
            result: Tensor = module(x)
        return result

    def step(kind: str) -> None:
        for leaf in leaves:
            leaf.grad = None
        with precision(kind, device):
            y = module(x)
        y.float().sum().backward()

    row: dict[str, Any] = {"workload": name, "rows": x.shape[0]}
    row["auto"] = faster_precision(torch.device(device), module)
    row["error"] = float(f"{harness.relative_error(forward('bf16').float(), forward('fp32')):.1e}")
    if harness.wrong({"": row["error"]}, ERROR_LIMIT):
        return row | {"not_timed": "wrong result"}
    runs: dict[str, Callable[[str], Any]] = {"forward": forward, "step": step}
    for what, run in runs.items():
        times = harness.interleave(
            {kind: lambda run=run, kind=kind: run(kind) for kind in ("fp32", "bf16")},  # type: ignore[misc]
            rounds=options.rounds,
            min_seconds=options.min_seconds,
            warmup=2,
            device=device,
        )
        for kind in times:
            row[f"{what}_{kind}_ms"] = round(harness.summarize(times[kind])["median_ms"], 3)
        row[f"{what}_bf16_gain"] = round(harness.ratio_to(times["fp32"], times["bf16"]), 2)
    return row


def costs(row: dict[str, Any]) -> bool:
    """Whether the other precision than `auto`'s makes a step faster by more than a tenth, or a result was wrong."""
    gain = row.get("step_bf16_gain")
    return gain is None or (1 / gain if row["auto"] == "bf16" else gain) > CLEAR


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1024, help="tokens; images are a 64th of it")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--min-seconds", type=float, default=0.3)
    parser.add_argument("--device", default=harness.default_device(), choices=["cpu", "cuda"])
    parser.add_argument("--no-save", action="store_true", help="print only")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    rows = []
    for name, module, x in workloads(options.rows, options.device):
        rows.append(measure(name, module.train(), x, options.device, options))
        print(rows[-1], flush=True)
    if not options.no_save:
        print(harness.save("bf16", rows))
    if faults := [row for row in rows if costs(row)]:
        sys.exit(f"precision auto is not the faster one here: {faults}")


if __name__ == "__main__":
    main()
