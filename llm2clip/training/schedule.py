"""The learning rate as a pure function of the step: warm-up, then cosine, constant, or constant and down at the end."""

from __future__ import annotations

import math

import torch

from llm2clip.settings import OptimSettings


def lr_factor(step: int, total: int, settings: OptimSettings) -> float:
    """Share of the peak learning rate at `step` (0-based) of `total` steps.

    `wsd` falls with 1 - sqrt of the progress through its last part (Hägele et al. 2024, arXiv 2405.18392).
    """
    warmup = min(settings.warmup_steps, total)
    if step < warmup:
        return (step + 1) / warmup
    if settings.schedule == "constant":
        return 1.0
    begin = warmup
    if settings.schedule == "wsd":
        begin = max(warmup, total - round(settings.decay_share * total))
        if step < begin:
            return 1.0
    progress = min(1.0, (step - begin) / max(1, total - begin))
    left = (
        1.0 - math.sqrt(progress)
        if settings.schedule == "wsd"
        else 0.5 * (1.0 + math.cos(math.pi * progress))
    )
    return settings.final_lr + (1.0 - settings.final_lr) * left


def set_learning_rate(
    optimizer: torch.optim.Optimizer, step: int, total: int, settings: OptimSettings
) -> float:
    """Set every group's learning rate for `step`; returns the peak group's (scale 1) value."""
    rate = settings.lr * lr_factor(step, total, settings)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]
    return rate
