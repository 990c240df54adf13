"""Settings of every training run: optimizer, length, batch, bookkeeping and hardware."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llm2clip.errors import ConfigError
from llm2clip.settings.base import at_least, setting


@dataclass(frozen=True, kw_only=True)
class OptimSettings:
    """Optimizer, its parameter groups, its schedule, and the average of the weights."""

    name: Literal["adamw", "lion"] = setting(
        "adamw",
        "`adamw`, fused where torch has it; or `lion` (pip install 'llm2clip[lion]'), which wants a third of AdamW's "
        "rate and three times its decay",
    )
    lr: float = setting(1e-4, "peak learning rate")
    lr_scales: dict[str, float] = setting(
        factory=dict,
        help="factor on the learning rate per parameter group (`vision`, `adapter`, `lora`, ...)",
    )
    layer_decay: dict[str, float] = setting(
        factory=dict,
        help="factor per layer, from the last layer of a group down to its first (`vision: 0.85`); groups not named "
        "here have one rate",
    )
    freeze: tuple[str, ...] = setting((), "parameter groups that stay as they are (`logit_scale`, ...)")
    weight_decay: float = setting(0.05, "decoupled weight decay; never on norms, biases and the logit scale")
    no_decay: tuple[str, ...] = setting(
        (), "further parameters without weight decay, by patterns of their names (`*.embeddings.*`)"
    )
    betas: tuple[float, float] = setting((0.9, 0.98), "momentum coefficients")
    eps: float = setting(1e-8, "AdamW epsilon")
    warmup_steps: int = setting(50, "steps of linear warm-up")
    schedule: Literal["cosine", "constant", "wsd"] = setting(
        "cosine",
        "what follows the warm-up: `cosine`, `constant`, or `wsd`: constant, then down over the last "
        "`decay_share` of the steps",
    )
    decay_share: float = setting(0.2, "wsd: share of all steps in which the rate goes down")
    final_lr: float = setting(0.0, "learning rate that cosine and wsd end at, as a share of the peak")
    grad_clip: float = setting(1.0, "largest gradient norm over all parameters; 0 never clips")
    ema: float = setting(
        0.0, "decay of an exponential moving average of the weights, for example 0.9998; 0: none"
    )
    ema_export: bool = setting(
        True,
        "evaluate and export the averaged weights; False: the last ones, the average stays in checkpoints",
    )

    def __post_init__(self) -> None:
        at_least("optim", self, 0, "lr", "weight_decay", "eps", "warmup_steps", "final_lr", "grad_clip")
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ConfigError(f"optim.betas: expected two numbers in [0, 1), got {list(self.betas)}")
        if not 0.0 <= self.ema < 1.0:
            raise ConfigError(f"optim.ema: expected a decay in [0, 1), got {self.ema}")
        if not 0.0 <= self.decay_share <= 1.0:
            raise ConfigError(f"optim.decay_share: expected a share in [0, 1], got {self.decay_share}")
        for name, decay in self.layer_decay.items():
            if not decay > 0.0:
                raise ConfigError(f"optim.layer_decay.{name}: expected a factor above 0, got {decay}")


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
    precision: Literal["fp32", "bf16", "fp16", "auto"] = setting(
        "fp32",
        "bf16 and fp16 run the forward under autocast, fp16 with a scaled loss; weights and loss stay fp32; "
        "auto: bf16 where it is faster (CUDA GPUs; CPUs with AMX; CPUs with AVX-512 BF16 unless the model trains "
        "depthwise convolutions), else fp32",
    )
    parallel: Literal["ddp", "fsdp"] = setting(
        "ddp", "several ranks: each holds all weights (`ddp`), or its shard of them (`fsdp`, torch's FSDP2)"
    )
    device: str = setting("auto", "auto: cuda where there is one, else cpu")
    threads: int = setting(0, "CPU threads; 0 leaves torch's choice")
    timeout: float = setting(
        1800.0,
        "seconds after which a rank that waits for another gives up; more than an evaluation (on one rank) takes",
    )
    seed: int = setting(0, "seed of initialisation, shuffling, dropout and caption choice")
    log_every: int = setting(10, "steps between two lines of metrics")
    save_every: int = setting(200, "steps between two checkpoints")
    keep_checkpoints: int = setting(2, "checkpoints kept; older ones are removed")
    eval_every: int = setting(0, "steps between two evaluations on `data.val`; 0: only at the end")
    resume: bool = setting(True, "go on from the newest checkpoint in `out`; False refuses a used directory")
    tensorboard: bool = setting(False, "also write TensorBoard events")
    wandb: str | None = setting(None, "also log to this project of Weights & Biases")
    peak_tflops: float | None = setting(
        None,
        "what one device computes at best, for the MFU in the metrics; null: known for NVIDIA's data-centre GPUs; "
        "0: do not count FLOPs",
    )

    def __post_init__(self) -> None:
        at_least("run", self, 1, "batch_size", "log_every", "save_every", "keep_checkpoints", "timeout")
        at_least("run", self, 0, "steps", "epochs", "micro_batch", "eval_every", "threads", "seed")
        at_least("run", self, 0, "peak_tflops")
