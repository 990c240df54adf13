"""Settings of the benchmarks: retrieval, zero-shot classification, linear probe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llm2clip.errors import ConfigError
from llm2clip.settings.base import at_least, setting
from llm2clip.settings.data import DataSettings
from llm2clip.settings.llm import LLMSettings

Layer = Literal["projected", "tower"]
EvaluationPrecision = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True, kw_only=True)
class BenchmarkSettings:
    """What every benchmark needs: models, where captions come from, where results go."""

    models: dict[str, str] = setting(
        factory=dict,
        help="name in the tables -> what to evaluate: a run or model directory of the CLIP stage, a published "
        "checkpoint, `transformers:DIRECTORY` (a CLIP or SigLIP model), or `open_clip:NAME@WEIGHTS` (file or tag) or "
        "`open_clip:local-dir:DIRECTORY`",
    )
    baseline: str = setting(
        "", "model that the others are compared with, query by query; empty: the first of several"
    )
    stores: tuple[str, ...] = setting(
        (), "embedding stores; each LLM2CLIP model takes those that its own LLM made"
    )
    llm: LLMSettings = setting(factory=LLMSettings, help="LLM for captions that are in no store")
    llm_adapter: str = setting("", "peft adapter of the LLM stage")
    download: bool = setting(False, "let baselines be downloaded from their model hub")
    out: str = setting("", "directory of results.json, tables.md, tables.tex and report.html")
    cache: str = setting(
        "", "directory of the features, shared by all ranks and runs; empty: `features` in `out`"
    )
    limit: int | None = setting(None, "use only the first so many images, for a quick look")
    max_bad_share: float = setting(
        0.0,
        "go on without images that are missing or damaged up to this share; the report says so. 0: all must be there",
    )
    batch_size: int = setting(64, "images per forward pass")
    workers: int = setting(0, "processes that decode images, per rank; 0 decodes in the evaluating process")
    token_budget: int = setting(
        0, "tokens per forward pass of the LLM, padding included; 0: 1024 on a CPU, 8192 elsewhere"
    )
    precision: EvaluationPrecision = setting(
        "fp32", "precision of the image side; similarities are always fp32"
    )
    device: str = setting("auto", "auto: cuda where there is one, else cpu")
    threads: int = setting(0, "CPU threads; 0 leaves torch's choice")
    resamples: int = setting(1000, "bootstrap samples behind the 95 % intervals")
    samples: int = setting(6, "queries of each kind that the report shows with their pictures")
    seed: int = setting(0, "seed of the bootstrap and of the queries shown")

    def __post_init__(self) -> None:
        at_least("evaluate", self, 1, "limit", "batch_size", "resamples")
        at_least("evaluate", self, 0, "workers", "token_budget", "samples", "max_bad_share")
        if self.baseline and self.baseline not in self.models:
            raise ConfigError(
                f"baseline: {self.baseline!r} is none of the models: {', '.join(self.models) or 'none given'}"
            )


@dataclass(frozen=True, kw_only=True)
class RetrievalSettings(BenchmarkSettings):
    """`llm2clip evaluate retrieval`: image-text retrieval on published benchmarks and own data."""

    datasets: dict[str, str] = setting(
        factory=dict,
        help="data set -> its directory: flickr30k, coco, sharegpt4v, urban1k, docci, dci, flickr30k-cn, coco-cn, "
        "xm3600, openstax (docs/evaluation.md lists the files)",
    )
    images: dict[str, str] = setting(
        factory=dict, help="data set -> directory of its images, where they are not below its own directory"
    )
    splits: dict[str, str] = setting(
        factory=dict, help="data set -> split other than the one papers report (xm3600: languages, `en,de`)"
    )
    captions_per_image: int | None = setting(
        None, "at most so many captions of an image; null: as papers do (5 for flickr30k and coco, else all)"
    )
    data: DataSettings = setting(factory=DataSettings, help="own data: `val` is evaluated")
    distractors: tuple[str, ...] = setting(
        (), "sources (docs/data-formats.md) whose images join every gallery and belong to no caption"
    )
    center: bool = setting(
        False,
        "rank captions less the mean of all of their kind, and images less that of the gallery; for languages that "
        "neither stage has seen",
    )
    ks: tuple[int, ...] = setting((1, 5, 10), "recall is measured at these ranks")
    captions_out: str = setting(
        "", "write every caption to this .jsonl, for `llm2clip embed data.val=FILE`, and stop"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("evaluate", self, 1, "captions_per_image")
        if not self.ks or any(k < 1 for k in self.ks):
            raise ConfigError(f"ks: expected ranks of at least 1, got {list(self.ks)}")


@dataclass(frozen=True, kw_only=True)
class ZeroShotSettings(BenchmarkSettings):
    """`llm2clip evaluate zero-shot`: classification by class names in prompts."""

    images: str = setting(
        "",
        "labelled images: a directory with a folder per class (ImageNet's layout), tar shards with `.cls` members, or "
        "a .csv with a label column",
    )
    classes: str = setting(
        "",
        "class names: a .txt with a name per line, ImageNet's LOC_synset_mapping.txt, or a .json: a list, folder -> "
        "name, index -> [folder, name], or data set -> list as in clip-benchmark; empty: names of the folders",
    )
    classes_key: str = setting("imagenet1k", "entry of a .json that holds several data sets")
    prompts: tuple[str, ...] = setting(
        ("single", "ensemble"),
        "rows of the table: `single` (a photo of a ...), `ensemble` (OpenAI's 80 templates), `name` (the name "
        "alone), `cupl`, `cupl+ensemble`, or a file with a template per line ({c} or {} stands for the name)",
    )
    cupl: str = setting("", "CuPL .json: class name -> sentences; needed by the `cupl` rows")
    worst: int = setting(10, "classes and confusions shown from the bottom and the top")
    prompts_out: str = setting(
        "", "write every prompt to this .jsonl, for `llm2clip embed data.val=FILE`, and stop"
    )


@dataclass(frozen=True, kw_only=True)
class LinearProbeSettings(BenchmarkSettings):
    """`llm2clip evaluate linear-probe`: a linear classifier and nearest neighbours on frozen features."""

    train: str = setting("", "labelled training images, as `images` of zero-shot")
    test: str = setting("", "labelled test images")
    val: str = setting("", "labelled images that choose the regularisation; empty: a share of `train`")
    val_share: float = setting(0.1, "share of each class of `train` that chooses the regularisation")
    classes: str = setting("", "class names for the report, as in zero-shot")
    classes_key: str = setting("imagenet1k", "entry of a .json that holds several data sets")
    layer: Layer = setting(
        "projected", "features `projected` into the space of the captions, or the `tower`'s own"
    )
    decay_min: float = setting(1e-6, "smallest weight decay of the sweep")
    decay_max: float = setting(1e2, "largest weight decay of the sweep")
    sweep: int = setting(9, "weight decays tried on a logarithmic grid; around the best one it is refined")
    iterations: int = setting(1000, "L-BFGS steps of a fit at most")
    neighbours: tuple[int, ...] = setting((1, 20), "k of the nearest-neighbour rows, up to 64; empty: none")
    temperature: float = setting(0.07, "neighbours vote with weight exp(similarity / temperature)")
    worst: int = setting(10, "classes and confusions shown from the bottom and the top")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("evaluate", self, 1, "iterations")
        at_least("evaluate", self, 2, "sweep")
        if not 0 < self.val_share < 1:
            raise ConfigError(f"val_share: expected a share between 0 and 1, got {self.val_share}")
        if not 0 < self.decay_min < self.decay_max:
            raise ConfigError(
                f"decay_min and decay_max: expected 0 < min < max, got {self.decay_min} and {self.decay_max}"
            )
        if any(not 1 <= k <= 64 for k in self.neighbours):
            raise ConfigError(f"neighbours: expected numbers from 1 to 64, got {list(self.neighbours)}")
        if not self.temperature > 0:
            raise ConfigError(f"temperature: expected more than 0, got {self.temperature}")
