"""The optimizer over named parameter groups: rates by group and layer, what is not decayed, the gradients' norm."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from llm2clip.errors import ConfigError
from llm2clip.models.groups import no_decay
from llm2clip.settings import OptimSettings
from llm2clip.training.layers import layer_numbers

NamedParameters = Sequence[tuple[str, nn.Parameter]]
_FUSED_ADAMW = ("cuda", "cpu", "mps", "xpu")


def freeze(groups: Mapping[str, NamedParameters], names: Iterable[str]) -> None:
    """Stop training the groups of these names.

    Raises:
        ConfigError: there is no such group.
    """
    for name in _known(names, groups, "optim.freeze"):
        for _, parameter in groups[name]:
            parameter.requires_grad_(False)


def build_optimizer(groups: Mapping[str, NamedParameters], settings: OptimSettings) -> torch.optim.Optimizer:
    """AdamW or Lion over the trainable parameters of named groups.

    Each group is split by layer, where it has a layer decay, and by weight decay; the learning rate of a part is
    `settings.lr` times its `lr_scale`. The order of groups and parameters is that of `groups`, so a checkpoint of
    the optimizer fits a run that was built from the same settings.

    Raises:
        ConfigError: a setting names no group, nothing is trainable, or the package of the optimizer is missing.
    """
    _known(settings.lr_scales, groups, "optim.lr_scales")
    _known(settings.layer_decay, groups, "optim.layer_decay")
    entries: dict[tuple[str, float, bool], dict[str, Any]] = {}
    for group, parameters in groups.items():
        numbers = layer_numbers([name for name, _ in parameters])
        last = max(numbers, default=0)
        for (name, parameter), number in zip(parameters, numbers, strict=True):
            if not parameter.requires_grad:
                continue
            decayed = not no_decay(name, parameter)
            decayed = decayed and not any(fnmatchcase(name, pattern) for pattern in settings.no_decay)
            scale = settings.lr_scales.get(group, 1.0)
            scale *= settings.layer_decay.get(group, 1.0) ** (last - number)
            entry = {
                "params": [],
                "lr": settings.lr * scale,
                "lr_scale": scale,
                "weight_decay": settings.weight_decay if decayed else 0.0,
                "name": group,
            }
            entries.setdefault((group, scale, not decayed), entry)["params"].append(parameter)
    if not entries:
        raise ConfigError("nothing is trainable: every parameter is frozen; check `freeze` and `lora.rank`")
    # decayed before not decayed in every group, layers in order
    rank = {group: number for number, group in enumerate(groups)}
    ordered = [entries[key] for key in sorted(entries, key=lambda key: (rank[key[0]], *key[1:]))]
    if settings.name == "lion":
        return _lion(ordered, settings)
    return torch.optim.AdamW(
        ordered,
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        fused=ordered[0]["params"][0].device.type in _FUSED_ADAMW,
    )


def clip_gradients(optimizer: torch.optim.Optimizer, limit: float) -> Tensor:
    """Scale all gradients to a total norm of at most `limit` (0: never).

    Returns:
        The norm before, 0-dim, over all ranks' shards where parameters are sharded.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    # torch's norm takes either kind of tensor, but not both at once
    kinds = (
        [p for p in parameters if not isinstance(p, DTensor)],
        [p for p in parameters if isinstance(p, DTensor)],
    )
    norms = []
    for kind in filter(None, kinds):
        norm = torch.nn.utils.get_total_norm([p.grad for p in kind if p.grad is not None])
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    total = torch.linalg.vector_norm(torch.stack(norms)) if len(norms) > 1 else norms[0]
    if limit > 0:
        for kind in filter(None, kinds):
            torch.nn.utils.clip_grads_with_norm_(kind, limit, total)
    return total


def _known(names: Iterable[str], groups: Mapping[str, NamedParameters], setting: str) -> list[str]:
    """The names, which must be groups."""
    if unknown := sorted(set(names) - set(groups)):
        raise ConfigError(f"{setting} names {', '.join(unknown)}; the groups are {', '.join(groups)}")
    return list(names)


def _lion(entries: list[dict[str, Any]], settings: OptimSettings) -> torch.optim.Optimizer:
    """Lion (Chen et al. 2023, arXiv 2302.06675) from the package lion-pytorch."""
    try:
        from lion_pytorch import Lion
        from lion_pytorch.foreach import Lion as ForeachLion
    except ImportError:
        raise ConfigError("optim.name lion: the package is missing; pip install 'llm2clip[lion]'") from None
    if not settings.lr > 0:
        raise ConfigError(f"optim.lr: lion needs a rate above 0, got {settings.lr}")
    sharded = any(isinstance(parameter, DTensor) for entry in entries for parameter in entry["params"])
    optimizer: torch.optim.Optimizer = (Lion if sharded else ForeachLion)(
        entries, lr=settings.lr, betas=settings.betas
    )
    return optimizer
