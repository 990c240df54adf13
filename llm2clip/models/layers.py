"""A vision tower's parameters in order of depth, for locking (LiT); learning rates by depth: `training.layers`.

The groups are open_clip's: patch and position embeddings; then every block, the last one together with the norm and
pooling after it. Behind them stands the model's projection, which is a group of its own and no part of the tower.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from llm2clip.errors import ModelError


@dataclass(frozen=True)
class LayerGroup:
    """Parameters of one depth.

    Attributes:
        name: `embeddings`, `layer.0`, `layer.1`, ...
        parameters: their names in the module that was asked.
    """

    name: str
    parameters: tuple[str, ...]


def block_list(module: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and modules of the outermost list of like blocks; of several equally deep, the longest.

    Raises:
        ModelError: there is none.
    """
    found: list[tuple[int, int, str, nn.ModuleList]] = []
    for name, child in module.named_modules():
        if isinstance(child, (nn.ModuleList, nn.Sequential)) and len(child) > 0:
            kinds = {type(block) for block in child}
            if len(kinds) == 1 and any(True for _ in child.parameters()) and _is_block(child[0]):
                found.append((name.count("."), -len(child), name, child))  # type: ignore[arg-type]
    if not found:
        raise ModelError(f"{type(module).__name__} has no list of blocks; it cannot be locked by groups")
    _, _, name, blocks = min(found, key=lambda entry: entry[:3])
    return name, blocks


def _is_block(module: nn.Module) -> bool:
    # a list of single layers (the convolutions of a stem) is not a list of blocks
    return any(True for _ in module.children())


def layer_groups(module: nn.Module) -> list[LayerGroup]:
    """The groups of a vision model, input first; every parameter is in exactly one.

    Modules registered before the blocks count as embeddings, those after them belong to the last block.
    """
    prefix, blocks = block_list(module)
    names: list[list[str]] = [[] for _ in range(len(blocks) + 1)]
    reached = 0
    for name, _ in module.named_parameters():
        if name.startswith(f"{prefix}."):
            reached = int(name[len(prefix) + 1 :].partition(".")[0]) + 1
        names[reached].append(name)
    titles = ["embeddings", *(f"layer.{index}" for index in range(len(blocks)))]
    return [
        LayerGroup(title, tuple(members)) for title, members in zip(titles, names, strict=True) if members
    ]


def lock_groups(module: nn.Module, groups: Sequence[LayerGroup], unlocked: int) -> None:
    """Freeze all but the last `unlocked` groups; what was frozen in those already stays frozen."""
    if unlocked > len(groups):
        raise ModelError(
            f"unlocked_groups: the tower has {len(groups)} groups and the projection, so at most "
            f"{len(groups) + 1}, got {unlocked + 1}"
        )
    for group in groups[: len(groups) - unlocked]:
        for name in group.parameters:
            module.get_parameter(name).requires_grad_(False)
