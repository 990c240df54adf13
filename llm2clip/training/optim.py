"""AdamW with parameter groups, and warm-up + cosine as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llm2clip.errors import ConfigError
from llm2clip.models.groups import no_decay
from llm2clip.settings import OptimSettings

NamedParameters = Sequence[tuple[str, nn.Parameter]]


def build_optimizer(groups: Mapping[str, NamedParameters], settings: OptimSettings) -> torch.optim.AdamW:
    """AdamW over the trainable parameters of named groups.

    Each group becomes one with and one without weight decay; its learning rate is `settings.lr` times
    `settings.lr_scales[group]`. The order of groups and parameters is that of `groups`, so a checkpoint of the
    optimizer fits a run that was built from the same settings.

    Raises:
        ConfigError: a scale names no group, or nothing is trainable.
    """
    unknown = sorted(set(settings.lr_scales) - set(groups))
    if unknown:
        raise ConfigError(f"optim.lr_scales names {', '.join(unknown)}; the groups are {', '.join(groups)}")
    entries: list[dict[str, Any]] = []
    for group, parameters in groups.items():
        scale = settings.lr_scales.get(group, 1.0)
        for decay in (True, False):
            chosen = [p for name, p in parameters if p.requires_grad and no_decay(name, p) is not decay]
            if chosen:
                entries.append(
                    {
                        "params": chosen,
                        "lr": settings.lr * scale,
                        "lr_scale": scale,
                        "weight_decay": settings.weight_decay if decay else 0.0,
                        "name": group,
                    }
                )
    if not entries:
        raise ConfigError("nothing is trainable: every parameter is frozen; check `freeze` and `lora.rank`")
    device = entries[0]["params"][0].device
    return torch.optim.AdamW(
        entries,
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        fused=device.type in ("cuda", "cpu"),
    )


def lr_factor(step: int, total: int, settings: OptimSettings) -> float:
    """Share of the peak learning rate at `step` (0-based) of `total` steps."""
    warmup = min(settings.warmup_steps, total)
    if step < warmup:
        return (step + 1) / warmup
    if settings.schedule == "constant":
        return 1.0
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return settings.final_lr + (1.0 - settings.final_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))


def set_learning_rate(
    optimizer: torch.optim.Optimizer, step: int, total: int, settings: OptimSettings
) -> float:
    """Set every group's learning rate for `step`; returns the peak group's (scale 1) value."""
    rate = settings.lr * lr_factor(step, total, settings)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]
    return rate


def clip_gradients(optimizer: torch.optim.Optimizer, limit: float) -> Tensor:
    """Scale all gradients to a total norm of at most `limit` (0: never); returns the norm before, 0-dim."""
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    return torch.nn.utils.clip_grad_norm_(parameters, limit if limit > 0 else float("inf"))
