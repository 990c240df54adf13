"""Settings of the CLIP stage: data, model, loss, run."""

from __future__ import annotations

from dataclasses import dataclass

from llm2clip.errors import ConfigError
from llm2clip.settings.base import setting
from llm2clip.settings.clip_loss import ClipLossSettings, TeacherSettings
from llm2clip.settings.data import DataSettings
from llm2clip.settings.model import ModelSettings, TextSettings
from llm2clip.settings.run import OptimSettings, RunSettings


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """`llm2clip train`: the CLIP stage."""

    data: DataSettings = setting(factory=DataSettings, help="images and captions")
    store: str = setting("", "embedding store made by `llm2clip embed`")
    text: TextSettings = setting(
        factory=TextSettings, help="captions: from the store, or from the LLM itself"
    )
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
        if self.text.source != "stored" and self.run.parallel == "fsdp":
            raise ConfigError(
                f"run.parallel: with text.source {self.text.source} ranks make different numbers of forwards, which "
                "sharded weights do not allow; use ddp, or embed the captions first"
            )
        if self.features and any(distill.tower.values()):
            raise ConfigError(
                "features: the tower is frozen and absent, so it cannot learn from loss.distill.tower"
            )
