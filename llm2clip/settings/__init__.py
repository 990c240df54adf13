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
from llm2clip.settings.caption_retrieval import CaptionRetrievalSettings
from llm2clip.settings.clip import TrainSettings
from llm2clip.settings.clip_loss import ClipLossSettings, DistillSettings, TeacherSettings
from llm2clip.settings.data import CaptionSettings, DataSettings
from llm2clip.settings.embed_clip import EmbedImagesSettings, EmbedTextsSettings
from llm2clip.settings.evaluate import EvaluateSettings
from llm2clip.settings.export import ExportLayout, ExportSettings
from llm2clip.settings.llm import (
    CaptionLossSettings,
    EmbedSettings,
    FinetuneLLMSettings,
    Layout,
    LLMSettings,
    LoraSettings,
    MaskingSettings,
    Objective,
    PairSettings,
    Pooling,
    Precision,
    Quantization,
    StoreDtype,
    Template,
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
from llm2clip.settings.plan import PlanSettings
from llm2clip.settings.run import OptimSettings, RunSettings
from llm2clip.settings.search import SearchSettings

__all__ = [
    "BenchmarkSettings",
    "CaptionLossSettings",
    "CaptionRetrievalSettings",
    "CaptionSettings",
    "ClipLossSettings",
    "ClipTextSettings",
    "DataSettings",
    "DistillSettings",
    "EmbedImagesSettings",
    "EmbedSettings",
    "EmbedTextsSettings",
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
    "MaskingSettings",
    "ModelSettings",
    "Objective",
    "OptimSettings",
    "PairSettings",
    "PlanSettings",
    "Pooling",
    "Precision",
    "Quantization",
    "RetrievalSettings",
    "RunSettings",
    "SearchSettings",
    "StoreDtype",
    "TeacherSettings",
    "Template",
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
