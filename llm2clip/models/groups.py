"""Parameter groups for the optimizer."""

from __future__ import annotations

from torch import nn

_PREFIXES = {
    "vision_model.": "vision",
    "visual_projection.": "projection",
    "text_adapter.": "adapter",
    "clip_text.": "clip_text",
    "text_projection.": "projection",
    "text_fusion.": "projection",
    "logit_scale": "logit_scale",
    "logit_bias": "logit_bias",
}
_NEVER_DECAYED = (
    "position_embedding",
    "positional_embedding",
    "pos_embed",
    "class_embedding",
    "cls_token",
    "mask_token",
    "reg_token",
    "register_tokens",
)


def group_of(name: str) -> str:
    """Group of a parameter by its name.

    vision (with the tower's own adapters), projection, adapter, clip_text, logit_scale, logit_bias, lora (the LLM's
    adapters), or other.
    """
    group = next((group for prefix, group in _PREFIXES.items() if name.startswith(prefix)), "other")
    return "lora" if group == "other" and ".lora_" in name else group


def parameter_groups(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Trainable parameters of an LLM2CLIP model or a caption encoder by group; empty groups are left out."""
    groups: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(group_of(name), []).append(parameter)
    return groups


def no_decay(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay must leave a parameter alone: biases, norms, scalars, position and class tokens.

    Everything with at most one dimension that matters is one of them, whatever it is called; the tokens
    are recognised by name.
    """
    if parameter.ndim < 2 or name.endswith(".bias") or name == "logit_scale":
        return True
    return any(part in name for part in _NEVER_DECAYED)
