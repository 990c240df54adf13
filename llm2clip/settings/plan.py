"""Settings of the planner."""

from __future__ import annotations

from dataclasses import dataclass

from llm2clip.errors import ConfigError
from llm2clip.settings.base import at_least, setting
from llm2clip.settings.clip import TrainSettings
from llm2clip.settings.llm import EmbedSettings, FinetuneLLMSettings


@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """`llm2clip plan`: memory, disk, FLOPs and hours of both stages, and what would not fit, before anything starts."""

    llm: str = setting(
        "", "name of a known LLM, or a directory with its config.json; empty: `finetune.llm.path`"
    )
    tower: str = setting(
        "", "name of a known tower, or a transformers directory; empty: as `train.model.vision` says"
    )
    pairs: int = setting(0, "training images; each has `captions_per_image` captions")
    captions_per_image: int = setting(2, "captions of an image that are embedded and stored")
    caption_tokens: int = setting(64, "tokens of a caption on average, prompt and template included")
    gpus: int = setting(1, "GPUs, all of the same kind")
    gpu: str = setting("", "name of the GPU; empty: `gpu_memory_gib` and `peak_tflops` say")
    gpu_memory_gib: float | None = setting(None, "memory of one GPU; null: that of `gpu`")
    peak_tflops: float | None = setting(
        None, "what one GPU multiplies at best in the precision of the run; null: by `gpu`'s data sheet"
    )
    reserve_gib: float = setting(
        2.0,
        "memory left to the CUDA context, libraries' workspaces, communication and fragmentation; an assumption",
    )
    assumed_utilisation: float = setting(
        0.4, "share of the peak that is reached where no measured MFU is given; an assumption"
    )
    finetune_mfu: float | None = setting(
        None, "measured: `mfu` in the metrics.jsonl of a short run of `finetune-llm`; null: none"
    )
    embed_mfu: float | None = setting(
        None, "measured: the share of the peak that `embed` reaches; null: none"
    )
    train_mfu: float | None = setting(
        None, "measured: `mfu` in the metrics.jsonl of a short run of `train`; null: none"
    )
    finetune: FinetuneLLMSettings = setting(
        factory=FinetuneLLMSettings, help="the LLM stage, as `finetune-llm` takes it"
    )
    embed: EmbedSettings = setting(factory=EmbedSettings, help="embedding, as `embed` takes it")
    train: TrainSettings = setting(factory=TrainSettings, help="the CLIP stage, as `train` takes it")
    out: str = setting("", "file to write the plan to, as JSON; empty: none")

    def __post_init__(self) -> None:
        at_least("plan", self, 1, "captions_per_image", "caption_tokens", "gpus")
        at_least("plan", self, 0, "reserve_gib", "pairs")
        for name in ("gpu_memory_gib", "peak_tflops"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ConfigError(f"plan.{name}: expected a number above 0, got {value!r}")
        for name in ("assumed_utilisation", "finetune_mfu", "embed_mfu", "train_mfu"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ConfigError(f"plan.{name}: expected a share above 0 and at most 1, got {value!r}")
