"""Settings of every training run: optimizer, length, batch, bookkeeping and hardware."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llm2clip.errors import ConfigError
from llm2clip.settings.base import at_least, setting


@dataclass(frozen=True, kw_only=True)
class OptimSettings:
    """AdamW and its schedule."""

    lr: float = setting(1e-4, "peak learning rate")
    lr_scales: dict[str, float] = setting(
        factory=dict,
        help="factor on the learning rate per parameter group (`vision`, `adapter`, `lora`, ...)",
    )
    weight_decay: float = setting(0.05, "decoupled weight decay; never on norms, biases and the logit scale")
    betas: tuple[float, float] = setting((0.9, 0.98), "AdamW momentum coefficients")
    eps: float = setting(1e-8, "AdamW epsilon")
    warmup_steps: int = setting(50, "steps of linear warm-up")
    schedule: Literal["cosine", "constant"] = setting("cosine", "what follows the warm-up")
    final_lr: float = setting(0.0, "learning rate that the cosine ends at, as a share of the peak")
    grad_clip: float = setting(1.0, "largest gradient norm over all parameters; 0 never clips")

    def __post_init__(self) -> None:
        at_least("optim", self, 0, "lr", "weight_decay", "eps", "warmup_steps", "final_lr", "grad_clip")
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ConfigError(f"optim.betas: expected two numbers in [0, 1), got {list(self.betas)}")


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Length, batch, bookkeeping and hardware of a run."""

    out: str = setting("", "run directory: config, metrics.jsonl, checkpoints, result")
    steps: int | None = setting(None, "optimizer steps; null: `epochs` decides")
    epochs: float = setting(1.0, "passes over the training data when `steps` is not given")
    batch_size: int = setting(256, "samples per optimizer step over all ranks; the contrastive batch")
    micro_batch: int = setting(
        0, "samples per forward pass and rank; smaller than the batch: gradient cache; 0: whole batch"
    )
    precision: Literal["fp32", "bf16", "auto"] = setting(
        "fp32",
        "bf16 runs the forward under autocast, weights and loss stay fp32; "
        "auto: bf16 where it is faster (CUDA GPUs; CPUs with AMX; CPUs with AVX-512 BF16 unless the model trains "
        "depthwise convolutions), else fp32",
    )
    device: str = setting("auto", "auto: cuda where there is one, else cpu")
    threads: int = setting(0, "CPU threads; 0 leaves torch's choice")
    seed: int = setting(0, "seed of initialisation, shuffling, dropout and caption choice")
    log_every: int = setting(10, "steps between two lines of metrics")
    save_every: int = setting(200, "steps between two checkpoints")
    keep_checkpoints: int = setting(2, "checkpoints kept; older ones are removed")
    eval_every: int = setting(0, "steps between two evaluations on `data.val`; 0: only at the end")
    resume: bool = setting(True, "go on from the newest checkpoint in `out`; False refuses a used directory")
    tensorboard: bool = setting(False, "also write TensorBoard events")

    def __post_init__(self) -> None:
        at_least("run", self, 1, "batch_size", "log_every", "save_every", "keep_checkpoints")
        at_least("run", self, 0, "steps", "epochs", "micro_batch", "eval_every", "threads", "seed")
