"""Settings of `llm2clip embed images` and `llm2clip embed texts`: features of CLIP models, into a store."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llm2clip.settings.base import at_least, setting
from llm2clip.settings.data import DataSettings
from llm2clip.settings.llm import StoreDtype
from llm2clip.settings.model import Fit, VisionSettings


@dataclass(frozen=True, kw_only=True)
class EmbedImagesSettings:
    """`llm2clip embed images`: image features of a teacher or of a frozen tower, each once, into a store."""

    data: DataSettings = setting(factory=DataSettings, help="images of `train` are embedded")
    model: str = setting(
        "",
        "directory of a whole CLIP or SigLIP model: features in its shared space, of unit norm, for a teacher",
    )
    vision: VisionSettings = setting(
        factory=VisionSettings,
        help="without `model`: the tower whose own features are stored, for `train.features`",
    )
    views: int = setting(
        0, "augmented views of every image, cut as training cuts them; 0: the whole image, once"
    )
    fit: Fit = setting("pad", "views: how images become square for the student's tower (`model.vision.fit`)")
    out: str = setting("", "directory of the store")
    dtype: StoreDtype = setting("fp16", "stored precision; int8 has one scale per row")
    shard_rows: int = setting(65536, "features per shard file")
    commit_rows: int = setting(2048, "features between two commits; at most so many are lost by a kill")
    batch_size: int = setting(64, "images per forward pass")
    precision: Literal["fp32", "bf16", "fp16", "auto"] = setting(
        "auto", "of the forward pass, as in `run.precision`"
    )
    device: str = setting("auto", "auto: cuda where there is one, else cpu")
    threads: int = setting(0, "CPU threads; 0 leaves torch's choice")

    def __post_init__(self) -> None:
        at_least("embed images", self, 0, "views", "threads")
        at_least("embed images", self, 1, "batch_size", "shard_rows", "commit_rows")


@dataclass(frozen=True, kw_only=True)
class EmbedTextsSettings:
    """`llm2clip embed texts`: caption features of a teacher's own text tower, each caption once, into a store."""

    data: DataSettings = setting(factory=DataSettings, help="captions of `train` and `val` are embedded")
    model: str = setting("", "directory of a whole CLIP or SigLIP model, with its tokenizer")
    out: str = setting("", "directory of the store")
    dtype: StoreDtype = setting("fp16", "stored precision; int8 has one scale per row")
    shard_rows: int = setting(65536, "features per shard file")
    commit_rows: int = setting(2048, "features between two commits; at most so many are lost by a kill")
    batch_size: int = setting(256, "captions per forward pass")
    device: str = setting("auto", "auto: cuda where there is one, else cpu")
    threads: int = setting(0, "CPU threads; 0 leaves torch's choice")

    def __post_init__(self) -> None:
        at_least("embed texts", self, 0, "threads")
        at_least("embed texts", self, 1, "batch_size", "shard_rows", "commit_rows")
