"""Settings of the CLIP stage: data, model, loss, run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llm2clip.errors import ConfigError
from llm2clip.settings.base import setting
from llm2clip.settings.data import DataSettings
from llm2clip.settings.model import ModelSettings
from llm2clip.settings.run import OptimSettings, RunSettings


@dataclass(frozen=True, kw_only=True)
class ClipLossSettings:
    """Loss of the CLIP stage."""

    kind: Literal["softmax", "sigmoid"] = setting(
        "softmax",
        "over the whole batch of all ranks: `softmax`, symmetric InfoNCE; or `sigmoid`, SigLIP's loss with a learned "
        "bias",
    )
    label_smoothing: float = setting(0.0, "softmax: share of the target spread over the batch")
    mask_duplicates: bool = setting(True, "never put two images of one group into a rank's batch")

    def __post_init__(self) -> None:
        if self.kind == "sigmoid" and self.label_smoothing != 0.0:
            raise ConfigError(
                f"loss.label_smoothing: the sigmoid loss has none, got {self.label_smoothing}; set it to 0"
            )


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """`llm2clip train`: the CLIP stage."""

    data: DataSettings = setting(factory=DataSettings, help="images and captions")
    store: str = setting("", "embedding store made by `llm2clip embed`")
    model: ModelSettings = setting(factory=ModelSettings, help="model")
    loss: ClipLossSettings = setting(factory=ClipLossSettings, help="contrastive loss")
    optim: OptimSettings = setting(factory=OptimSettings, help="optimizer")
    run: RunSettings = setting(factory=RunSettings, help="run")
