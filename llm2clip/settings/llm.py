"""Settings of the LLM stage and of embedding: the LLM, its adapters, the contrastive loss over captions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llm2clip.errors import ConfigError
from llm2clip.settings.base import at_least, setting
from llm2clip.settings.data import DataSettings
from llm2clip.settings.run import OptimSettings, RunSettings

Precision = Literal["fp32", "bf16"]
Pooling = Literal["mean", "weighted_mean", "eos", "last", "bos"]
Template = Literal["none", "auto", "tokenizer", "llama3", "mistral", "gemma", "chatml", "phi3"]
Quantization = Literal["none", "8bit", "4bit"]
Objective = Literal["contrastive", "simcse", "mntp"]
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
    merge: tuple[str, ...] = setting(
        (),
        "peft adapter directories merged into the weights before `adapter` is put on, in order: a chain such as "
        "LLM2Vec's MNTP and supervised adapters",
    )
    dim: int | None = setting(
        None, "only the first so many values of an embedding (Matryoshka); null: as recorded, else all"
    )
    bidirectional: bool = setting(True, "full attention instead of causal attention")
    pooling: Pooling = setting(
        "mean",
        "how token states become one embedding, header and instruction left out: `mean`; `weighted_mean`, later tokens "
        "count more; `eos`, the end-of-sequence token, added where the tokenizer adds none; `last`, the last token as "
        "it is; `bos`, the first",
    )
    max_length: int = setting(512, "longest caption in tokens, prompt included; the rest is cut and counted")
    prompt: str = setting("", "instruction put before every caption and left out of the pooling")
    template: Template = setting(
        "none",
        "user's turn of the chat that the LLM was tuned for, put around every caption: a model family; `tokenizer`, "
        "its own chat template; `auto`, none for a model without one, else by its special tokens",
    )
    dtype: Precision = setting("fp32", "precision of the frozen weights")
    quantization: Quantization = setting(
        "none", "frozen weights in 8 or 4 bits (NF4) through the package bitsandbytes; LoRA stays fp32"
    )
    layout: Layout = setting(
        "auto",
        "`packed` lays captions end to end without padding, `padded` batches them by length; "
        "auto: packed where the model can (docs/packing.md)",
    )


@dataclass(frozen=True, kw_only=True)
class PairSettings:
    """How texts become training pairs of a query and a positive."""

    instructions: dict[str, str] = setting(
        factory=dict,
        help="instruction before the query, verbatim: under `short` and `long` for a caption that looks for the other "
        "of its image (which one is drawn each time), under a file's name without suffix for the queries of a "
        "query/positive file",
    )
    symmetric: tuple[str, ...] = setting(
        (), "names of `instructions` whose positives and negatives get the instruction too"
    )
    negatives: Literal["given", "random", "none"] = setting(
        "given",
        "hard negatives: those that a query/positive file brings; `random`: also a caption of a random other image of "
        "the source; `none`",
    )
    one_source: bool = setting(
        True,
        "every batch comes from one source, batches in random order. Without `data.weights` all sources of captions "
        "count as one",
    )

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.symmetric) - set(self.instructions)):
            raise ConfigError(
                f"pairs.symmetric: {', '.join(unknown)} has no instruction; pairs.instructions has "
                f"{', '.join(self.instructions) or 'none'}"
            )


@dataclass(frozen=True, kw_only=True)
class MaskingSettings:
    """Masked next-token prediction (LLM2Vec's first step)."""

    probability: float = setting(0.2, "share of the tokens that are to be predicted")
    token: Literal["blank", "eos", "mask"] = setting(
        "blank",
        "what stands in their place: the token `_`, the end-of-sequence token, or the tokenizer's mask",
    )
    replace: Literal["bert", "all"] = setting(
        "bert", "`bert`: 80 % masked, 10 % a random token, 10 % left as they are; `all`: all masked"
    )

    def __post_init__(self) -> None:
        if not 0.0 < self.probability <= 1.0:
            raise ConfigError(
                f"masking.probability: expected a share above 0 and at most 1, got {self.probability}"
            )


@dataclass(frozen=True, kw_only=True)
class CaptionLossSettings:
    """Loss of the LLM stage."""

    kind: Literal["symmetric", "hard_negative"] = setting(
        "symmetric", "`symmetric` InfoNCE over both texts, or LLM2Vec's one-directional `hard_negative` NLL"
    )
    scale: float = setting(20.0, "logit scale on cosine similarities (the paper's code: 50)")
    learn_scale: bool = setting(False, "train the scale, from `scale` on")
    max_scale: float = setting(100.0, "upper bound of a trained scale")
    mask_duplicates: bool = setting(
        True,
        "texts of one group (image), or pairs with an equal text, are no negatives of each other, over all ranks",
    )
    matryoshka: tuple[int, ...] = setting(
        (),
        "dimensions whose prefixes of the embedding are trained to work alone: the loss is averaged over them",
    )

    def __post_init__(self) -> None:
        if not 0.0 < self.scale < float("inf"):
            raise ConfigError(f"loss.scale: expected a number above 0, got {self.scale}")
        if self.learn_scale and self.scale > self.max_scale:
            raise ConfigError(f"loss.scale {self.scale} is above loss.max_scale {self.max_scale}")
        if any(dim < 1 for dim in self.matryoshka) or len(set(self.matryoshka)) < len(self.matryoshka):
            raise ConfigError(
                f"loss.matryoshka: expected different dimensions of at least 1, got {list(self.matryoshka)}"
            )


@dataclass(frozen=True, kw_only=True)
class FinetuneLLMSettings:
    """`llm2clip finetune-llm`: the LLM stage. LoRA adapters by one of three objectives."""

    objective: Objective = setting(
        "contrastive",
        "`contrastive`: two texts of one image are close; `simcse`: a text is close to itself under other dropout; "
        "`mntp`: masked next-token prediction, a first step for bidirectional attention",
    )
    data: DataSettings = setting(factory=DataSettings, help="captions, query/positive files, plain texts")
    llm: LLMSettings = setting(factory=LLMSettings, help="base model")
    lora: LoraSettings = setting(factory=LoraSettings, help="adapters")
    text_field: str = setting(
        "text",
        "simcse, mntp: field of plain text (lines of a .txt file have it); a sample with captions gives one of those, "
        "drawn each time",
    )
    pairs: PairSettings = setting(factory=PairSettings, help="texts to pairs (contrastive)")
    masking: MaskingSettings = setting(factory=MaskingSettings, help="masks (mntp)")
    loss: CaptionLossSettings = setting(factory=CaptionLossSettings, help="contrastive loss")
    token_budget: int = setting(
        0,
        "tokens of a forward pass and rank: the gradient cache cuts the batch into packs of pairs of at most "
        "so many tokens, and memory is that of one pack; 0: `run.micro_batch` cuts it by pairs",
    )
    attention_dropout: float = setting(
        0.0,
        "dropout on the attention weights while training (LLM2Vec's simcse: 0.3); packed attention has none, so "
        "captions are padded",
    )
    gradient_checkpointing: bool = setting(
        False,
        "keep only each layer's input for the backward pass: less memory, one more forward of each layer",
    )
    optim: OptimSettings = setting(factory=OptimSettings, help="optimizer")
    run: RunSettings = setting(factory=RunSettings, help="run")

    def __post_init__(self) -> None:
        at_least("finetune-llm", self, 0, "token_budget")
        if not 0.0 <= self.attention_dropout < 1.0:
            raise ConfigError(f"attention_dropout: expected a share in [0, 1), got {self.attention_dropout}")
        if self.objective == "mntp" and not self.llm.bidirectional:
            raise ConfigError(
                "objective=mntp prepares an LLM for attention to both sides; set llm.bidirectional=true"
            )
        if self.run.parallel == "fsdp" and self.llm.quantization != "none":
            raise ConfigError(
                "run.parallel=fsdp: quantised weights cannot be split over ranks; set llm.quantization=none, or "
                "run.parallel=ddp, where each rank holds the whole quantised model"
            )


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
