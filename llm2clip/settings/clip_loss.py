"""Settings of the CLIP stage's loss: the contrastive part, and what is learned from a teacher."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from llm2clip.errors import ConfigError
from llm2clip.settings.base import at_least, setting

FEATURE_LOSSES = ("cosine", "mse", "structure")


@dataclass(frozen=True, kw_only=True)
class TeacherSettings:
    """Where the features of a teacher come from (docs/clip-stage.md)."""

    start: bool = setting(
        False,
        "the vision tower as the run begins with it, frozen: for `loss.distill.tower` (self-distillation)",
    )
    model: str = setting(
        "", "directory of a whole CLIP or SigLIP model of transformers, which runs frozen beside the student"
    )
    images: str = setting("", "store of a teacher's image features, made by `llm2clip embed images`")
    texts: str = setting("", "store of a teacher's caption features, made by `llm2clip embed texts`")
    views: int = setting(
        0, "augmented views of each image in the stores of image features; 0: the whole image, once"
    )

    def __post_init__(self) -> None:
        at_least("teacher", self, 0, "views")
        if self.views and not self.images:
            raise ConfigError("teacher.views: views are stored ones; set teacher.images to their store")
        if self.model and (self.images or self.texts):
            raise ConfigError("teacher.model: give a model or stores of its features, not both")


@dataclass(frozen=True, kw_only=True)
class DistillSettings:
    """What is learned from the teacher's features, as weights of losses: `cosine`, `mse`, `structure`."""

    image: dict[str, float] = setting(
        factory=dict,
        help="image features in the shared space: `mse`, squared distance (ProCLIP's instance loss); `cosine`, one "
        "minus the cosine; `structure`, squared difference of all similarities within the batch (after ProCLIP's "
        "structure loss)",
    )
    text: dict[str, float] = setting(factory=dict, help="the same for caption features")
    tower: dict[str, float] = setting(
        factory=dict, help="the same for the vision tower's own features, against `teacher.start`"
    )
    similarity: float = setting(
        0.0,
        "weight of the cross-entropy between the student's and the teacher's image-caption similarities (open_clip's "
        "distillation, MobileCLIP)",
    )
    teacher_scale: float = setting(100.0, "multiplier of the teacher's similarities")

    def __post_init__(self) -> None:
        at_least("loss.distill", self, 0, "similarity", "teacher_scale")
        for name in ("image", "text", "tower"):
            weights: Mapping[str, float] = getattr(self, name)
            if unknown := sorted(set(weights) - set(FEATURE_LOSSES)):
                raise ConfigError(
                    f"loss.distill.{name}: expected weights of {', '.join(FEATURE_LOSSES)}, got {', '.join(unknown)}"
                )
            if any(not weight >= 0 for weight in weights.values()):
                raise ConfigError(f"loss.distill.{name}: expected weights of at least 0, got {dict(weights)}")


@dataclass(frozen=True, kw_only=True)
class ClipLossSettings:
    """Loss of the CLIP stage."""

    kind: Literal["softmax", "sigmoid", "cosine", "none"] = setting(
        "softmax",
        "over the whole batch of all ranks: `softmax`, symmetric InfoNCE; `sigmoid`, SigLIP's loss with a learned "
        "bias; `cosine`, pairs alone against a text side that is fixed (LIFT); `none`, distillation alone",
    )
    label_smoothing: float = setting(0.0, "softmax: share of the target spread over the batch")
    duplicates: Literal["auto", "mask", "positive", "drop", "keep"] = setting(
        "auto",
        "two images of one group in a batch: `mask`, no negatives of each other, over all ranks; `positive`, positives "
        "of each other's captions, over all ranks; `drop`, one of them leaves its rank's batch; `keep`, negatives; "
        "auto: `mask`, or `positive` where masks are not defined (sigmoid, several captions per image)",
    )
    clip_text: float = setting(
        1.0,
        "weight of each further loss of a model with CLIP's own text tower beside the LLM's: images against it, and "
        "the two text towers against each other",
    )
    distill: DistillSettings = setting(factory=DistillSettings, help="what is learned from a teacher")

    def __post_init__(self) -> None:
        at_least("loss", self, 0, "clip_text", "label_smoothing")
        if self.kind != "softmax" and self.label_smoothing != 0.0:
            raise ConfigError(
                f"loss.label_smoothing: the {self.kind} loss has none, got {self.label_smoothing}; set it to 0"
            )
        if self.kind == "sigmoid" and self.duplicates == "mask":
            raise ConfigError("loss.duplicates: the sigmoid loss has no mask; use positive or drop")
        if self.kind == "none" and not self.distilled:
            raise ConfigError("loss.kind none: there is nothing to learn; give loss.distill a weight")

    @property
    def distilled(self) -> bool:
        """Whether anything is learned from a teacher."""
        parts = (self.distill.image, self.distill.text, self.distill.tower)
        return self.distill.similarity > 0 or any(weight > 0 for part in parts for weight in part.values())
