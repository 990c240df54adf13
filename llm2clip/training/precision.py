"""Precision of the forward pass, and the scale of the loss that fp16 gradients need."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from llm2clip.training.faster_precision import faster_precision

Autocast = Callable[[], AbstractContextManager[Any]]
# below this scale fp16 gradients overflow although the loss is small: training has diverged
SMALLEST_SCALE = 1.0
_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast_of(precision: str, device: torch.device, trained: nn.Module | None = None) -> Autocast:
    """The context of every forward pass for `run.precision`.

    Args:
        precision: fp32, bf16, fp16, or auto: what `faster_precision` finds.
        device: where the model runs.
        trained: the model that the forward passes train; None: there is no backward pass.
    """
    if precision == "auto":
        precision = faster_precision(device, trained)
    if precision == "fp32":
        return nullcontext
    return lambda: torch.autocast(device.type, dtype=_HALF[precision])


def scaler_of(precision: str, device: torch.device) -> torch.amp.GradScaler:
    """The scaler of the loss; it does nothing but for fp16, whose gradients would underflow."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")
