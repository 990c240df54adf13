"""CLIP's own text tower, for models that keep it beside the LLM (LLM2CLIP, arXiv 2411.04997, tables 9 and A8)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llm2clip.errors import ModelError
from llm2clip.files import read_json
from llm2clip.models.weights import one_tensor

_CLASSES = {"clip_text_model": "CLIPTextModel", "siglip_text_model": "SiglipTextModel"}
TOKENIZER = "clip_tokenizer"
"""Directory of the tower's tokenizer beside a model's weights."""


@dataclass(frozen=True)
class ClipTokens:
    """Captions as CLIP's text tower takes them: input_ids and attention_mask, (B, L) int64."""

    input_ids: Tensor
    attention_mask: Tensor

    def to(self, device: torch.device | str) -> ClipTokens:
        """The same tokens on `device`."""
        return ClipTokens(self.input_ids.to(device), self.attention_mask.to(device))

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, rows: slice) -> ClipTokens:
        return ClipTokens(self.input_ids[rows], self.attention_mask[rows])


class ClipText(nn.Module):
    """Pooled feature (B, dim) of a CLIP or SigLIP text tower.

    Args:
        model: transformers text model.
        tokenizer: its tokenizer; None: captions must come as tokens.
        projection: the checkpoint's own projection (D, dim), to begin with where it has the model's D.

    Attributes:
        dim: width of the feature.
        context: longest caption in tokens; the rest is cut.
    """

    def __init__(self, model: nn.Module, tokenizer: Any = None, projection: Tensor | None = None) -> None:
        super().__init__()
        # whether there is a shell around the tower depends on transformers' version; names in files do not
        self.model: Any = getattr(model, "text_model", model)
        self.tokenizer = tokenizer
        self.pretrained_projection = None if projection is None else (projection, None)
        config: Any = self.model.config
        self.context = int(config.max_position_embeddings)
        self._siglip = config.model_type == "siglip_text_model"
        # SigLIP's pooled state goes through a head of its own
        self.dim = int(config.projection_size if self._siglip else config.hidden_size)

    def forward(self, tokens: ClipTokens) -> Tensor:
        """Tokens of B captions -> (B, dim), not normalised."""
        # SigLIP was trained to look at its padding
        mask = None if self._siglip else tokens.attention_mask
        return self.model(input_ids=tokens.input_ids, attention_mask=mask).pooler_output

    def tokenize(self, texts: Sequence[str]) -> ClipTokens:
        """Captions to tokens, cut to the tower's context.

        Raises:
            ModelError: the tower has no tokenizer.
        """
        if self.tokenizer is None:
            raise ModelError("this CLIP text tower was loaded without its tokenizer; give it tokens")
        encoded = self.tokenizer(
            list(texts),
            padding="max_length" if self._siglip else True,
            truncation=True,
            max_length=self.context,
            return_tensors="pt",
            return_attention_mask=True,
        )
        return ClipTokens(encoded["input_ids"], encoded["attention_mask"])

    def to_config(self) -> dict[str, Any]:
        """All that is needed to rebuild the tower without its weights."""
        from llm2clip.models.hf_vision import config_to_dict

        return config_to_dict(self.model.config)


def load_clip_text(path: str | os.PathLike[str]) -> ClipText:
    """The text half of a CLIP or SigLIP model directory, with its tokenizer.

    Raises:
        ModelError: no such model there, or weights or tokenizer are missing.
    """
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"model.clip_text.path {folder} is not a transformers model directory (no config.json); nothing is "
            "downloaded"
        )
    values = read_json(folder / "config.json", ModelError)
    config = _text_config(values if isinstance(values, dict) else {}, str(folder))
    import transformers

    try:
        model, report = getattr(transformers, _CLASSES[config.model_type]).from_pretrained(
            folder, config=config, dtype=torch.float32, output_loading_info=True, local_files_only=True
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers and safetensors raise a dozen unrelated types here
        raise ModelError(
            f"cannot load the CLIP text tower in {folder}: {type(error).__name__}: {error}"
        ) from error
    if missing := sorted(report.get("missing_keys", ())):
        raise ModelError(
            f"{folder} lacks {len(missing)} weights of {type(model).__name__}: {', '.join(missing[:5])}"
        )
    return ClipText(model, tokenizer, one_tensor(folder, "text_projection.weight"))


def clip_text_from_config(
    values: Mapping[str, Any], tokenizer: str | os.PathLike[str] | None = None
) -> ClipText:
    """The tower that `ClipText.to_config` describes, with random weights.

    Args:
        values: the configuration.
        tokenizer: directory of its tokenizer, if there is one.
    """
    import transformers

    config = _text_config(values, "config.json")
    loaded = None
    if tokenizer is not None and Path(tokenizer).is_dir():
        loaded = transformers.AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
    return ClipText(getattr(transformers, _CLASSES[config.model_type])(config), loaded)


def _text_config(values: Mapping[str, Any], source: str) -> Any:
    from transformers import CONFIG_MAPPING, AutoConfig

    model_type = values.get("model_type")
    if model_type not in CONFIG_MAPPING:
        raise ModelError(f"{source}: transformers does not know the model type {model_type!r}")
    rest = {name: value for name, value in values.items() if name != "model_type"}
    config: Any = AutoConfig.for_model(model_type, **rest)
    config = getattr(config, "text_config", config)
    if config.model_type not in _CLASSES:
        raise ModelError(
            f"{source}: model type {model_type!r} has no CLIP text tower; known are {', '.join(_CLASSES)}"
        )
    return config
