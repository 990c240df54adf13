"""LoRA adapters on a vision tower, through peft, in place: module names stay, and files too once merged."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from llm2clip.errors import ModelError
from llm2clip.settings import VisionLoraSettings

# what families call queries, keys and values: transformers, EVA02, timm
_QUERIES_KEYS_VALUES = ("q_proj", "k_proj", "v_proj", "query", "key", "value", "qkv")
_ADAPTER = "default"


def lora_layers(trunk: nn.Module, targets: tuple[str, ...]) -> list[str]:
    """Full names of the linear layers that get an adapter.

    Args:
        trunk: the network.
        targets: last parts of their names; empty: queries, keys and values.

    Raises:
        ModelError: none matches; the message lists the linear layers there are.
    """
    wanted = targets or _QUERIES_KEYS_VALUES
    linear = [name for name, module in trunk.named_modules() if isinstance(module, nn.Linear)]
    found = [name for name in linear if name.rsplit(".", 1)[-1] in wanted]
    if not found:
        present = sorted({name.rsplit(".", 1)[-1] for name in linear})
        raise ModelError(
            f"none of vision.lora.targets ({', '.join(wanted)}) is a linear layer of the tower; it has "
            f"{', '.join(present) or 'none'}"
        )
    return found


def add_vision_lora(trunk: nn.Module, settings: VisionLoraSettings) -> None:
    """Freeze a network and put fresh adapters on it; they start at zero, so features do not change yet.

    Raises:
        ModelError: no target layer matches, or the rank is below 1.
    """
    if settings.rank < 1:
        raise ModelError(f"vision.lora.rank must be at least 1 to add an adapter, got {settings.rank}")
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=lora_layers(trunk, settings.targets),
        bias="none",
    )
    inject_adapter_in_model(config, trunk, _ADAPTER)
    for name, parameter in trunk.named_parameters():
        parameter.requires_grad_(".lora_" in name)
    if settings.fused == "auto":
        from llm2clip.integrations.peft import fuse_lora

        fuse_lora(trunk)


def has_lora(trunk: nn.Module) -> bool:
    """Whether a network carries adapters."""
    return any(".lora_" in name for name, _ in trunk.named_parameters())


def merged(trunk: Any) -> Any:
    """A copy of the network with its adapters in the weights, and names as if there had never been any."""
    from peft.tuners.lora.layer import LoraLayer

    plain = copy.deepcopy(trunk)
    for name, module in list(plain.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()  # type: ignore[attr-defined]
            parent, _, last = name.rpartition(".")
            setattr(plain.get_submodule(parent), last, module.get_base_layer())
    return plain
