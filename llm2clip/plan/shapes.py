"""Models by name that can be planned with before anything is downloaded, and GPUs: memory, arithmetic.

The sizes are those of the published config.json files; a directory with one of its own may be given instead.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from llm2clip.errors import ConfigError
from llm2clip.models.llm_layouts import llm_config
from llm2clip.models.preprocessing import Preprocessing
from llm2clip.models.trunk import VisionTrunk
from llm2clip.models.vision import VisionTower, build_vision_tower, set_up_training
from llm2clip.settings import VisionSettings


def _decoder(
    kind: str, width: int, hidden: int, layers: int, heads: int, groups: int, vocabulary: int, **more: Any
) -> dict[str, Any]:
    return {
        "model_type": kind, "hidden_size": width, "intermediate_size": hidden, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": groups, "vocab_size": vocabulary, **more,
    }  # fmt: skip


LLMS: dict[str, dict[str, Any]] = {
    "smollm2-135m": _decoder("llama", 576, 1536, 30, 9, 3, 49152),
    "smollm2-360m": _decoder("llama", 960, 2560, 32, 15, 5, 49152),
    "smollm2-1.7b": _decoder("llama", 2048, 8192, 24, 32, 32, 49152),
    "llama-3.2-1b": _decoder("llama", 2048, 8192, 16, 32, 8, 128256, head_dim=64),
    "llama-3.2-3b": _decoder("llama", 3072, 8192, 28, 24, 8, 128256, head_dim=128),
    "llama-3-8b": _decoder("llama", 4096, 14336, 32, 32, 8, 128256),
    "llama-3.1-8b": _decoder("llama", 4096, 14336, 32, 32, 8, 128256),
    "mistral-7b": _decoder("mistral", 4096, 14336, 32, 32, 8, 32768, sliding_window=None),
    "qwen2.5-0.5b": _decoder("qwen2", 896, 4864, 24, 14, 2, 151936),
    "qwen2.5-1.5b": _decoder("qwen2", 1536, 8960, 28, 12, 2, 151936),
    "qwen2.5-7b": _decoder("qwen2", 3584, 18944, 28, 28, 4, 152064),
    "qwen3-0.6b": _decoder("qwen3", 1024, 3072, 28, 16, 8, 151936, head_dim=128),
    "qwen3-8b": _decoder("qwen3", 4096, 12288, 36, 32, 8, 151936, head_dim=128),
}


def _vit(
    kind: str, width: int, hidden: int, layers: int, heads: int, patch: int, image: int
) -> dict[str, Any]:
    return {
        "model_type": kind, "hidden_size": width, "intermediate_size": hidden, "num_hidden_layers": layers,
        "num_attention_heads": heads, "patch_size": patch, "image_size": image,
    }  # fmt: skip


TOWERS: dict[str, dict[str, Any]] = {
    "clip-vit-b-32": _vit("clip_vision_model", 768, 3072, 12, 12, 32, 224),
    "clip-vit-b-16": _vit("clip_vision_model", 768, 3072, 12, 12, 16, 224),
    "clip-vit-l-14": _vit("clip_vision_model", 1024, 4096, 24, 16, 14, 224),
    "clip-vit-l-14-336": _vit("clip_vision_model", 1024, 4096, 24, 16, 14, 336),
    "siglip-b-16-224": _vit("siglip_vision_model", 768, 3072, 12, 12, 16, 224),
    "siglip-so400m-14-224": _vit("siglip_vision_model", 1152, 4304, 27, 16, 14, 224),
}
# towers of their own kinds
_NAMED_KINDS: dict[str, dict[str, Any]] = {
    "efficientnet-lite0": {"kind": "efficientnet-lite0"},
    "eva02-b-16": {"kind": "eva02", "name": "eva02-b-16"},
    "eva02-l-14": {"kind": "eva02", "name": "eva02-l-14"},
    "eva02-l-14-336": {"kind": "eva02", "name": "eva02-l-14-336"},
}


@dataclass(frozen=True)
class GPU:
    """What a GPU offers.

    Attributes:
        memory_gib: of one GPU, as the driver reports it, rounded down.
        tflops: dense bf16 (fp16 before Ampere) by its data sheet.
        fp32_tflops: fp32 without TF32.
    """

    memory_gib: float
    tflops: float
    fp32_tflops: float


GPUS: dict[str, GPU] = {
    "B200": GPU(178.0, 2250.0, 75.0),
    "H200": GPU(140.0, 989.0, 67.0),
    "H100": GPU(79.0, 989.0, 67.0),
    "A100-80GB": GPU(79.0, 312.0, 19.5),
    "A100-40GB": GPU(39.0, 312.0, 19.5),
    "L40S": GPU(44.0, 362.0, 91.6),
    "A40": GPU(44.0, 149.7, 37.4),
    "A10": GPU(22.0, 125.0, 31.2),
    "L4": GPU(22.0, 121.0, 30.3),
    "RTX4090": GPU(23.5, 165.2, 82.6),
    "RTX3090": GPU(23.5, 71.0, 35.6),
    "V100-32GB": GPU(31.5, 125.0, 15.7),
    "T4": GPU(14.5, 65.0, 8.1),
}


def find_gpu(name: str) -> GPU:
    """A GPU by name, in any case and with or without dashes.

    Raises:
        ConfigError: it is not known; the message lists those that are.
    """
    wanted = _plain(name)
    for known, gpu in GPUS.items():
        if _plain(known) == wanted:
            return gpu
    raise ConfigError(
        f"gpu: {name!r} is not known; known are {', '.join(GPUS)}. For another, set gpu_memory_gib and peak_tflops"
    )


def _plain(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())


def decoder_config(name: str) -> Any:
    """The transformers configuration of a decoder LLM.

    Args:
        name: a name of `LLMS`, or a directory with a config.json; weights need not be there.

    Raises:
        ConfigError: neither.
        ModelError: the directory's configuration cannot be used.
    """
    if Path(name).is_dir() and (Path(name) / "config.json").is_file():
        config = llm_config(Path(name))
        # multimodal checkpoints hold the decoder inside
        return config.get_text_config() if hasattr(config, "get_text_config") else config
    if name.lower() not in LLMS:
        raise ConfigError(
            f"llm: {name!r} is neither a directory with a config.json nor a known name: {', '.join(LLMS)}"
        )
    from transformers import AutoConfig

    values = dict(LLMS[name.lower()])
    return AutoConfig.for_model(values.pop("model_type"), **values)


def decoder(config: Any, layers: int | None = None) -> nn.Module:
    """A decoder of this configuration, without a language-model head; `layers`: the first so many of its layers."""
    import copy

    from transformers import AutoModel

    if layers is not None:
        config = copy.deepcopy(config)
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = list(config.layer_types)[:layers]
    model: nn.Module = AutoModel.from_config(config)
    return model


def layer_period(config: Any) -> int:
    """After how many layers their types repeat; all of them where they do not."""
    types = list(getattr(config, "layer_types", None) or ["?"] * config.num_hidden_layers)
    for period in range(1, len(types) + 1):
        if all(kind == types[i % period] for i, kind in enumerate(types)):
            return period
    return len(types)


def vision_tower(name: str, settings: VisionSettings) -> VisionTower:
    """A tower with random weights, set up for training as `settings` say.

    Args:
        name: a name of `TOWERS`, of an EVA02, `efficientnet-lite0`, or a transformers directory; empty: as `settings`.
        settings: lora, freezing, checkpointing, image size; kind, path and name where `name` is empty.

    Raises:
        ConfigError: the name is not known.
        ModelError: the tower cannot be built.
    """
    settings = replace(settings, pretrained=False, compile=False)
    if not name:
        return build_vision_tower(settings)
    if name.lower() in _NAMED_KINDS:
        return build_vision_tower(replace(settings, path=None, **_NAMED_KINDS[name.lower()]))
    if Path(name).is_dir():
        return build_vision_tower(replace(settings, kind="transformers", path=name))
    if name.lower() not in TOWERS:
        raise ConfigError(
            f"tower: {name!r} is neither a transformers directory nor a known name: "
            f"{', '.join([*TOWERS, *_NAMED_KINDS])}"
        )
    from llm2clip.models.hf_files import vision_from_dict

    values = TOWERS[name.lower()]
    size = settings.image_size or int(values["image_size"])
    trunk: VisionTrunk = vision_from_dict({**values, "image_size": size}, size, pooling=settings.pooling)
    tower = VisionTower(trunk, Preprocessing(size).chosen(settings))
    set_up_training(tower, settings)
    return tower
