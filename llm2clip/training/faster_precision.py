"""Which precision `run.precision: auto` takes: a rule of hardware and model, never of a measurement.

A measurement could come out otherwise when a run is resumed, and half of it would have been trained in another
precision. The rule is what `python -m benchmarks.bench_bf16` finds, and that benchmark fails where it is wrong.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn


def faster_precision(device: torch.device, trained: nn.Module | None) -> Literal["bf16", "fp32"]:
    """Returns the precision in which a model runs faster on `device`.

    bf16 where the processor multiplies it: CUDA and ROCm GPUs with bf16 units, CPUs with AMX or AVX-512 BF16 (twice
    the speed of fp32 and more; other CPUs convert every operand first). On CPUs with AVX-512 BF16 alone a model with
    depthwise convolutions to train stays in fp32: for these oneDNN's bf16 gradients take up to three times as long,
    which is more than the products around them gain.

    Args:
        device: where the model runs.
        trained: the model, with `requires_grad` set as it will be trained; None: it is not.
    """
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    # without oneDNN torch's own loops are slow in bf16 whatever the processor
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return "fp32"
    if torch.cpu._is_amx_tile_supported():
        return "bf16"
    if torch.cpu._is_avx512_bf16_supported() and not (trained is not None and _trains_depthwise(trained)):
        return "bf16"
    return "fp32"


def _trains_depthwise(module: nn.Module) -> bool:
    return any(
        isinstance(m, nn.Conv2d) and m.groups == m.in_channels > 1 and m.weight.requires_grad
        for m in module.modules()
    )
