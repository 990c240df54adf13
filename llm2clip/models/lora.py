"""LoRA adapters on the caption encoder's LLM, through peft."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from llm2clip.errors import ModelError
from llm2clip.models.fingerprint import json_digest, tensors_digest
from llm2clip.settings import LoraSettings

# families that fuse projections: what stands for a target that is not there
_FUSED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}


def is_peft(model: nn.Module) -> bool:
    """Whether a model already carries a peft adapter."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def base_model(model: Any) -> Any:
    """The transformers model inside an adapted model, or the model itself."""
    return model.get_base_model() if is_peft(model) else model


def lora_targets(model: nn.Module, wanted: Sequence[str]) -> list[str]:
    """Names of linear layers in `model` that get an adapter.

    A wanted name that the model lacks is replaced by the fused layer that contains it (Phi-3: `qkv_proj`,
    `gate_up_proj`) or left out.

    Raises:
        ModelError: none of the names matches; the message lists the linear layers there are.
    """
    present = {name.rsplit(".", 1)[-1] for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    chosen = {name if name in present else _FUSED.get(name, "") for name in wanted} & present
    if not chosen:
        raise ModelError(
            f"none of lora.targets ({', '.join(wanted) or 'empty'}) is a linear layer of "
            f"{type(model).__name__}; "
            f"it has {', '.join(sorted(present)) or 'none'}"
        )
    return sorted(chosen)


def add_lora(model: nn.Module, settings: LoraSettings) -> nn.Module:
    """A peft model over `model` with fresh adapters; only they are trainable.

    The update starts at zero, so embeddings are unchanged until the first training step.
    """
    if settings.rank < 1:
        raise ModelError(f"lora.rank must be at least 1 to add an adapter, got {settings.rank}")
    from peft import LoraConfig, TaskType, get_peft_model

    config = LoraConfig(
        task_type=TaskType.FEATURE_EXTRACTION,
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=lora_targets(model, settings.targets),
        bias="none",
    )
    adapted = get_peft_model(model, config)
    fuse(adapted, settings)
    return adapted


def fuse(model: nn.Module, settings: LoraSettings) -> None:
    """Run the adapted layers through `lora_linear` unless the settings say off; layers already fused stay so."""
    if settings.fused == "auto":
        from llm2clip.integrations.peft import fuse_lora

        fuse_lora(model)


def adapter_digest(model: nn.Module) -> str | None:
    """Hash of the adapter's weights and scalings; None without an adapter."""
    if not is_peft(model):
        return None
    scalings = {
        name: {key: float(value) for key, value in module.scaling.items()}
        for name, module in model.named_modules()
        if isinstance(getattr(module, "scaling", None), dict)
    }
    return json_digest([tensors_digest(adapter_tensors(model)), scalings])


def base_tensors(model: Any) -> list[tuple[str, Any]]:
    """Named weights of the LLM without adapter, under the names they have without peft."""
    return [
        (name.replace(".base_layer.", "."), tensor)
        for name, tensor in base_model(model).state_dict().items()
        if ".lora_" not in name
    ]


def adapter_tensors(model: Any, name: str = "default") -> list[tuple[str, Any]]:
    """The weights of the adapter `name` under the names that its file has."""
    from peft import get_peft_model_state_dict

    return list(get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False).items())
