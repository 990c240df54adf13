"""Settings of the export."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llm2clip.errors import ConfigError
from llm2clip.settings.base import setting
from llm2clip.settings.llm import LLMSettings

ExportLayout = Literal["native", "huggingface", "open_clip", "onnx", "llm"]


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """`llm2clip export`: a model in another layout, loaded back and compared before it takes its place."""

    model: str = setting("", "run or model directory of the CLIP stage, or any published LLM2CLIP checkpoint")
    layout: ExportLayout = setting(
        "huggingface",
        "`huggingface`: that of the published checkpoints; `open_clip`: a directory for open_clip's local-dir; `onnx`: "
        "image side and adapter for onnxruntime; `llm`: the caption encoder of `llm` with its adapter merged in; "
        "`native`: our own",
    )
    out: str = setting("", "directory to create, or to replace")
    llm: LLMSettings = setting(
        factory=LLMSettings,
        help="layout llm: the caption encoder; else only for the model card's base licence",
    )
    dtype: Literal["fp32", "bf16", "fp16"] = setting(
        "fp32", "precision of the written weights; onnx: fp32 alone"
    )
    licence: str = setting("", "licence of the model for its card, an SPDX name; empty claims none")
    base_llm: str = setting("", "name of the LLM under the caption encoder, for the card")
    base_licence: str = setting("", "licence of that LLM; empty: as the README.md in `llm.path` says")
    results: str = setting("", "results.json of an evaluation, for the card; empty: the run's last metrics")
    allow_missing: tuple[str, ...] = setting((), "patterns of weights that a published checkpoint may lack")
    allow_unexpected: tuple[str, ...] = setting(
        (), "patterns of weights of a published checkpoint to leave out"
    )

    def __post_init__(self) -> None:
        if self.layout == "onnx" and self.dtype != "fp32":
            raise ConfigError(f"export.dtype: the onnx layout is written in fp32, got {self.dtype}")
