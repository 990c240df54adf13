"""The encoder that a run of the LLM stage trains: loaded, given its adapters, and made to fit the hardware."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from llm2clip.errors import ConfigError, ModelError
from llm2clip.models.caption_encoder import CaptionEncoder
from llm2clip.models.lora import base_model
from llm2clip.models.packed import own_pack_above
from llm2clip.settings import FinetuneLLMSettings
from llm2clip.training.sharding import shard_frozen
from llm2clip.training.world import World


def trained_encoder(settings: FinetuneLLMSettings, world: World) -> CaptionEncoder:
    """Load the LLM with the adapters that are to be trained.

    Args:
        settings: model, adapters, seed; attention dropout, checkpointing and sharding.
        world: this rank; all ranks get the same first values.

    Raises:
        ModelError: the model cannot be used as asked.
        ConfigError: settings that exclude each other.
    """
    llm, sharded = settings.llm, is_sharded(settings, world)
    if settings.attention_dropout:
        if llm.layout == "packed":
            raise ConfigError("attention_dropout: packed attention has none; use llm.layout=auto or padded")
        llm = replace(llm, layout="padded")
    if llm.quantization == "4bit" and world.device.type == "cpu":
        # once it has run without gradients, bitsandbytes keeps a format for inference alone
        raise ConfigError(
            "llm.quantization=4bit: bitsandbytes has no gradients for 4-bit weights on a CPU; train with 8bit or none, "
            "or on a GPU"
        )
    encoder = CaptionEncoder.from_settings(llm, "cpu" if sharded else world.device)
    if settings.attention_dropout:
        _set_attention_dropout(base_model(encoder.model), settings.attention_dropout)
    torch.manual_seed(settings.run.seed)  # the adapters' initial values
    encoder.add_lora(settings.lora)
    model: Any = encoder.model
    if settings.gradient_checkpointing:
        # the other form of checkpointing wants an input with a gradient, which token ids have not
        base_model(model).gradient_checkpointing_enable({"use_reentrant": False})
    if sharded or settings.objective == "mntp":
        _require_one_pack(encoder)
    if sharded:
        if encoder.layout != "packed":
            raise ConfigError(
                "run.parallel=fsdp: ranks must make equally many forward passes, which only packed captions do; this "
                "model or llm.layout pads them (docs/packing.md). Set run.parallel=ddp."
            )
        if world.is_main:
            encoder.base_record()  # hashes the weights while they are whole
        shard_frozen(base_model(model), world)
    return encoder


def is_sharded(settings: FinetuneLLMSettings, world: World) -> bool:
    """Whether the frozen weights are split over the ranks."""
    return settings.run.parallel == "fsdp" and world.size > 1


def _set_attention_dropout(model: nn.Module, share: float) -> None:
    modules = [m for m in model.modules() if isinstance(getattr(m, "attention_dropout", None), float)]
    if not modules:
        raise ModelError(
            f"{type(model).__name__} has no attention dropout to set; use lora.dropout instead and attention_dropout=0"
        )
    for module in modules:
        module.attention_dropout = share  # type: ignore[assignment]


def _require_one_pack(encoder: CaptionEncoder) -> None:
    """Any texts must be able to share a pack, for objectives and ranks that make one forward of each chunk."""
    limit = own_pack_above(base_model(encoder.model))
    if encoder.layout == "packed" and limit is not None and encoder.max_length > limit:
        raise ConfigError(
            f"texts beyond {limit} tokens need a pack of their own in this model, which objective=mntp and "
            f"run.parallel=fsdp do not make; set llm.max_length to at most that, it is {encoder.max_length}"
        )
