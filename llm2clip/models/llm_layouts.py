"""LLM directories that bring their own code: LLM2Vec's, LLM2CLIP's and NVIDIA's encoders, read without running it.

Their classes differ from transformers' own in the attention mask alone, which is set here explicitly
(`models.bidirectional`), so their weights load into the plain classes of the family.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from llm2clip.errors import ModelError
from llm2clip.files import read_json

# the file that LLM2Vec.save writes beside its weights
_LLM2VEC_CONFIG = "llm2vec_config.json"
_POOLING = {
    "mean": "mean",
    "weighted_mean": "weighted_mean",
    "eos_token": "eos",
    "last_token": "last",
    "bos_token": "bos",
}
# LlamaEncoderModel, MistralBiModel, Qwen2BiForMNTP, LlamaBidirectionalModel, ...
_ENCODER_CLASS = re.compile(r"(\w+?)(?:Encoder|Bi|Bidirectional|Bidirec)(?:Model|ForMNTP)")


def llm_config(folder: Path) -> Any:
    """The transformers configuration of a directory; code that it names is never run.

    Raises:
        ModelError: transformers does not know the model type, nor does an architecture's name tell the family.
        OSError, ValueError: config.json is damaged (as transformers raises it).
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    content = read_json(folder / "config.json", ModelError)
    kind = content.get("model_type") if isinstance(content, dict) else None
    if kind in CONFIG_MAPPING or kind is None:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    family = _family(content.get("architectures") or (), CONFIG_MAPPING)
    if family is None:
        raise ModelError(
            f"{folder / 'config.json'} has the model type {kind!r}, which this version of transformers does not know "
            f"(architectures: {', '.join(content.get('architectures') or ()) or 'none'}). Its own code is not run; use "
            "a model of a family that transformers has."
        )
    return CONFIG_MAPPING[family].from_pretrained(folder, local_files_only=True)


def _family(architectures: list[str] | tuple[()], known: Any) -> str | None:
    for name in architectures:
        found = _ENCODER_CLASS.fullmatch(name)
        if found and found[1].lower() in known:
            return found[1].lower()
    return None


def refuse_adapter_alone(folder: Path) -> None:
    """Explain a directory that holds an adapter where a model is asked for: LLM2Vec's have a config.json, too.

    Raises:
        ModelError: it holds an adapter and no weights of a model.
    """
    adapter = folder / "adapter_config.json"
    if not adapter.is_file() or any(folder.glob("model*.safetensors")) or any(folder.glob("pytorch_model*")):
        return
    content = read_json(adapter, ModelError)
    base = content.get("base_model_name_or_path") if isinstance(content, dict) else None
    raise ModelError(
        f"{folder} holds a LoRA adapter and no weights of a model. Give llm.path its base model"
        + (f" ({base})" if base else "")
        + " as a local directory and this one as llm.adapter, or, where another adapter goes on top, in llm.merge."
    )


def llm2vec_options(folder: Path) -> dict[str, Any]:
    """Pooling and length limit that LLM2Vec recorded beside a model or adapter; empty where it did not.

    Raises:
        ModelError: the file is damaged, or names a pooling that does not exist here.
    """
    file = folder / _LLM2VEC_CONFIG
    if not file.is_file():
        return {}
    content = read_json(file, ModelError)
    if not isinstance(content, dict):
        raise ModelError(f"{file} must hold a JSON object, got {type(content).__name__}")
    mode = content.get("pooling_mode", "mean")
    if mode not in _POOLING:
        raise ModelError(f"{file}: pooling_mode {mode!r} is none of {', '.join(_POOLING)}")
    return {
        "bidirectional": True,
        "pooling": _POOLING[mode],
        "max_length": int(content.get("max_length", 512)),
    }
