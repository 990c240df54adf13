"""Precision of the forward pass, and the scale of the loss that fp16 gradients need."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

Autocast = Callable[[], AbstractContextManager[Any]]
# below this scale fp16 gradients overflow although the loss is small: training has diverged
SMALLEST_SCALE = 1.0
_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast_of(precision: str, device: torch.device) -> Autocast:
    """The context of every forward pass for `run.precision`."""
    if precision == "auto":
        precision = "bf16" if multiplies_bf16(device) else "fp32"
    if precision == "fp32":
        return nullcontext
    return lambda: torch.autocast(device.type, dtype=_HALF[precision])


def scaler_of(precision: str, device: torch.device) -> torch.amp.GradScaler:
    """The scaler of the loss; it does nothing but for fp16, whose gradients would underflow."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the processor has instructions for bf16 products."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu._is_amx_tile_supported())
