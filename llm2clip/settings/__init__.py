"""Every setting of every command, as typed frozen dataclasses.

`llm2clip.config` fills them from YAML and dotted overrides and refuses unknown names and wrong types;
docs/config.md is generated from the help texts here.
"""

from llm2clip.settings.base import at_least, setting
from llm2clip.settings.benchmarks import (
    BenchmarkSettings,
    EvaluationPrecision,
    Layer,
    LinearProbeSettings,
    RetrievalSettings,
    ZeroShotSettings,
)
from llm2clip.settings.clip import ClipLossSettings, TrainSettings
from llm2clip.settings.data import CaptionSettings, DataSettings
from llm2clip.settings.evaluate import EvaluateSettings
from llm2clip.settings.export import ExportLayout, ExportSettings
from llm2clip.settings.llm import (
    CaptionLossSettings,
    EmbedSettings,
    FinetuneLLMSettings,
    Layout,
    LLMSettings,
    LoraSettings,
    Pooling,
    Precision,
    StoreDtype,
)
from llm2clip.settings.model import (
    ClipTextSettings,
    Fit,
    Interpolation,
    ModelSettings,
    TextSettings,
    VisionKind,
    VisionLoraSettings,
    VisionPooling,
    VisionSettings,
)
from llm2clip.settings.run import OptimSettings, RunSettings

__all__ = [
    "BenchmarkSettings",
    "CaptionLossSettings",
    "CaptionSettings",
    "ClipLossSettings",
    "ClipTextSettings",
    "DataSettings",
    "EmbedSettings",
    "EvaluateSettings",
    "EvaluationPrecision",
    "ExportLayout",
    "ExportSettings",
    "FinetuneLLMSettings",
    "Fit",
    "Interpolation",
    "LLMSettings",
    "Layer",
    "Layout",
    "LinearProbeSettings",
    "LoraSettings",
    "ModelSettings",
    "OptimSettings",
    "Pooling",
    "Precision",
    "RetrievalSettings",
    "RunSettings",
    "StoreDtype",
    "TextSettings",
    "TrainSettings",
    "VisionKind",
    "VisionLoraSettings",
    "VisionPooling",
    "VisionSettings",
    "ZeroShotSettings",
    "at_least",
    "setting",
]
