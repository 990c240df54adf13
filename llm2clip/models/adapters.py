"""LoRA adapters from peft directories: put on a model, or merged into it one after the other.

LLM2Vec and LLM2CLIP publish chains: base <- MNTP <- supervised <- own. Each adapter was trained on the weights that the
ones before it had made, so all but the last are merged, in order, and the last one is put on top.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llm2clip.errors import ModelError
from llm2clip.models.fingerprint import json_digest, tensors_digest
from llm2clip.models.llm_files import read_encoder_config
from llm2clip.models.lora import adapter_tensors, base_model, base_tensors
from llm2clip.models.quantization import is_quantized

_NAME = "default"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter as it lies on disk.

    Attributes:
        path: its directory.
        config: peft's LoraConfig.
        tensors: its weights by name.
        base: our record of the model it was trained on; empty for other people's adapters.
    """

    path: Path
    config: Any
    tensors: dict[str, Tensor]
    base: dict[str, Any] = field(default_factory=dict)

    def digest(self) -> str:
        """Hash of the weights and of how they are scaled."""
        names = ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")
        return json_digest(
            [tensors_digest(self.tensors.items()), {name: getattr(self.config, name, None) for name in names}]
        )

    @property
    def made_for(self) -> str:
        """The base model that peft recorded, for messages."""
        name = getattr(self.config, "base_model_name_or_path", None)
        return f" It says that it was made for {name}." if name else ""


def read_adapter(path: str | os.PathLike[str]) -> Adapter:
    """Read a peft directory.

    Raises:
        ModelError: there is no adapter, it is damaged, or it is not a LoRA.
    """
    folder = Path(path)
    if not (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"{folder} is not a peft adapter directory (no adapter_config.json). Give llm.adapter or llm.merge the "
            "directory that `llm2clip finetune-llm` wrote, or leave it empty."
        )
    from peft import LoraConfig, PeftConfig, TaskType
    from peft.utils import load_peft_weights

    if not any((folder / name).is_file() for name in _WEIGHTS):
        # peft would look for it on a model hub
        raise ModelError(f"{folder} has neither {' nor '.join(_WEIGHTS)}; the adapter is incomplete")
    try:
        config = PeftConfig.from_pretrained(str(folder))
        tensors = load_peft_weights(str(folder), device="cpu")
    except Exception as error:  # damaged json, truncated safetensors, unknown peft type
        raise ModelError(f"cannot read the adapter in {folder}: {type(error).__name__}: {error}") from error
    if not isinstance(config, LoraConfig):
        raise ModelError(f"{folder} holds a {config.peft_type} adapter; only LoRA adapters are supported")
    ranks = [tensor.shape[0] for name, tensor in tensors.items() if "lora_A" in name and tensor.ndim > 1]
    said = [config.r, *(config.rank_pattern or {}).values()]
    if not all(isinstance(rank, int) and 0 < rank <= max(ranks, default=0) for rank in said):
        raise ModelError(
            f"{folder / 'adapter_config.json'} says rank {max(said, key=str)}, the adapter's weights have "
            f"{max(ranks, default='none')}; it is damaged or belongs to another adapter"
        )
    config.inference_mode = True
    # peft would import the module that the file names
    config.megatron_config = None
    # what is adapted here is the decoder without a head, whatever the adapter was trained through
    config.task_type, config.auto_mapping = TaskType.FEATURE_EXTRACTION, None
    return Adapter(folder, config, tensors, dict(read_encoder_config(folder).get("base") or {}))


def adapt(
    model: nn.Module,
    merge: Sequence[str | os.PathLike[str]] = (),
    adapter: str | os.PathLike[str] | None = None,
) -> tuple[nn.Module, dict[str, Any] | None]:
    """Merge the adapters `merge` into a model, in order, and put `adapter` on top.

    Returns:
        The model, and what an adapter trained on it would record as its base; None where that is not known yet,
        since hashing the weights takes a while.

    Raises:
        ModelError: an adapter is missing or damaged, or was made for another model.
    """
    chain = [read_adapter(folder) for folder in (*merge, *([adapter] if adapter else []))]
    record = None
    # hashed before they are changed, or to be compared
    if merge or any(link.base for link in chain):
        record = base_record(model)
        for number, link in enumerate(chain):
            _check_base(link, record | _merged_record(chain[:number]))
        record |= _merged_record(chain[: len(merge)])
    model = merge_adapters(model, chain[: len(merge)])
    if adapter:
        model = load_adapter(model, chain[-1])
    return model, record


def load_adapter(model: nn.Module, adapter: Adapter) -> nn.Module:
    """A peft model over `model` with an adapter, frozen.

    Raises:
        ModelError: the adapter was made for another model.
    """
    from peft import get_peft_model

    made_for = adapter.made_for
    adapter.config.base_model_name_or_path = getattr(model, "name_or_path", None)  # it may have moved since
    try:
        adapted = get_peft_model(model, adapter.config)
    except (RuntimeError, ValueError, KeyError) as error:
        raise _another_model(adapter, model, error, made_for) from error
    _fill(adapted, adapter, _NAME, made_for)
    return adapted.requires_grad_(False)


def merge_adapters(model: nn.Module, adapters: Sequence[Adapter]) -> nn.Module:
    """The model with every adapter merged into its weights, in order.

    Sums are taken in fp32 and rounded once to the weights' dtype, so that the result does not depend on the precision
    in which the base was loaded, up to that rounding. Memory above the model is that of the adapters and of one layer.

    Raises:
        ModelError: an adapter was made for another model, or the model's weights are quantised.
    """
    if not adapters:
        return model
    if is_quantized(model):
        raise ModelError(
            "llm.merge cannot change quantised weights; merge first (CaptionEncoder.save_pretrained writes the merged "
            "model) and load that with llm.quantization"
        )
    from peft import get_peft_model
    from peft.tuners.lora import LoraLayer

    names = [f"merge{number}" for number in range(len(adapters))]
    adapted: Any = None
    for name, adapter in zip(names, adapters, strict=True):
        made_for = adapter.made_for
        adapter.config.base_model_name_or_path = getattr(model, "name_or_path", None)
        try:
            if adapted is None:
                adapted = get_peft_model(model, adapter.config, adapter_name=name)
            else:
                adapted.add_adapter(name, adapter.config)
        except (RuntimeError, ValueError, KeyError) as error:
            raise _another_model(adapter, model, error, made_for) from error
        _fill(adapted, adapter, name, made_for)
    with torch.no_grad():
        for module in base_model(adapted).modules():
            if isinstance(module, LoraLayer):
                weight: Any = module.get_base_layer().weight
                dtype = weight.dtype
                weight.data = weight.data.float()
                for name in names:
                    module.merge(adapter_names=[name])
                    # the next one was trained on this sum: DoRA's norms are those of its base, not of ours
                    module.merged_adapters.clear()
                weight.data = weight.data.to(dtype)
    merged: nn.Module = adapted.base_model.unload()
    return merged.requires_grad_(False)


def base_record(model: Any) -> dict[str, Any]:
    """What llm2clip_config.json says of the model that an adapter is trained on.

    Args:
        model: the model as it was loaded, nothing merged yet; an adapter on top of it does not count.

    Returns:
        `model_type`; `weights_bf16`, a digest of the weights in bf16, so that it does not depend on the precision they
        were loaded in (not for quantised ones).
    """
    record: dict[str, Any] = {"model_type": str(base_model(model).config.model_type)}
    if not is_quantized(base_model(model)):
        record["weights_bf16"] = tensors_digest(base_tensors(model), dtype=torch.bfloat16)
    return record


def _merged_record(adapters: Sequence[Adapter]) -> dict[str, Any]:
    """What is added to `base_record` for adapters that are merged into the model, in order."""
    return {"merged": [adapter.digest() for adapter in adapters]} if adapters else {}


def _check_base(adapter: Adapter, record: dict[str, Any]) -> None:
    """Make sure that an adapter of ours meets the weights that it was trained on.

    Other people's adapters, and quantised weights, leave nothing to compare but names and shapes.

    Args:
        adapter: any adapter.
        record: `base_record` and `_merged_record` of the model that it is put on.

    Raises:
        ModelError: the base model, or what was merged into it, is another one.
    """
    made = adapter.base
    if "weights_bf16" not in made or "weights_bf16" not in record:
        return
    if made["weights_bf16"] != record["weights_bf16"]:
        raise ModelError(
            f"the adapter in {adapter.path} was trained on another base model ({made.get('model_type')}, weights "
            f"{made['weights_bf16']}) than this one ({record['model_type']}, weights {record['weights_bf16']}). Give "
            "llm.path the model that the adapter was trained on."
        )
    before, now = made.get("merged", []), record.get("merged", [])
    if before != now:
        raise ModelError(
            f"the adapter in {adapter.path} was trained on this model with {len(before)} other adapters merged into it "
            f"({', '.join(before) or 'none'}), now there are {len(now)} ({', '.join(now) or 'none'}). Give llm.merge "
            "the same adapters in the same order."
        )


def _fill(adapted: Any, adapter: Adapter, name: str, made_for: str) -> None:
    """Load an adapter's weights into the places that peft has made for it."""
    from peft import set_peft_model_state_dict

    base = base_model(adapted)
    expected = {key: tuple(tensor.shape) for key, tensor in adapter_tensors(adapted, name)}
    named = _renamed(adapter.tensors, set(expected))
    unexpected, missing = sorted(set(named) - set(expected)), sorted(set(expected) - set(named))
    if unexpected or missing:
        raise ModelError(
            f"the adapter in {adapter.path} does not fit {type(base).__name__}: {len(missing)} weights missing "
            f"({', '.join(missing[:3])}), {len(unexpected)} unexpected ({', '.join(unexpected[:3])}).{made_for}"
        )
    shapes = [
        f"{key} is {tuple(tensor.shape)}, expected {expected[key]}"
        for key, tensor in named.items()
        if tuple(tensor.shape) != expected[key]
    ]
    if shapes:
        raise ModelError(
            f"the adapter in {adapter.path} was made for another model than {type(base).__name__}: {len(shapes)} "
            f"weights have another shape ({'; '.join(shapes[:3])}).{made_for}"
        )
    set_peft_model_state_dict(adapted, named, adapter_name=name)


def _renamed(tensors: dict[str, Tensor], expected: set[str]) -> dict[str, Tensor]:
    """Names as on the bare decoder.

    Adapters trained on a causal-LM class, on LLM2Vec's MNTP class or on the decoder inside a multimodal model have
    further levels of names in front (`model.`, `language_model.`).
    """
    root = "base_model.model."
    ends = {name.removeprefix(root) for name in expected}
    for name in sorted(tensors):
        parts = name.removeprefix(root).split(".")
        for cut in range(len(parts)):
            if ".".join(parts[cut:]) in ends:
                prefix = root + "".join(f"{part}." for part in parts[:cut])
                if all(other.startswith(prefix) for other in tensors):
                    return {root + other.removeprefix(prefix): tensors[other] for other in sorted(tensors)}
    return {name: tensors[name] for name in sorted(tensors)}


def _another_model(adapter: Adapter, model: Any, error: Exception, made_for: str) -> ModelError:
    return ModelError(
        f"the adapter in {adapter.path} was made for another model than {type(model).__name__}: {error}.{made_for}"
    )
