"""Settings of the LLM stage and of embedding: the LLM, its adapters, the contrastive loss over captions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llm2clip.settings.base import at_least, setting
from llm2clip.settings.data import DataSettings
from llm2clip.settings.run import OptimSettings, RunSettings

Precision = Literal["fp32", "bf16"]
Pooling = Literal["mean", "weighted_mean", "eos"]
Layout = Literal["auto", "packed", "padded"]
StoreDtype = Literal["fp32", "bf16", "fp16", "int8", "fp8"]


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
    dtype: StoreDtype = setting("fp16", "stored precision; int8 and fp8 (e4m3) have one scale per row")
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
