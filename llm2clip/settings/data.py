"""Settings of the data: sources, and which caption fields play which role."""

from __future__ import annotations

from dataclasses import dataclass

from llm2clip.settings.base import setting


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
