"""Settings of the data: sources, and which caption fields play which role."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from llm2clip.errors import ConfigError
from llm2clip.settings.base import at_least, setting


@dataclass(frozen=True, kw_only=True)
class CaptionSettings:
    """Which caption fields play which role. Nested fields are written with a dot (`es.caption`)."""

    short: tuple[str, ...] = setting(("caption",), "short caption: the first of these fields that has text")
    long: tuple[str, ...] = setting(("alt",), "long caption: the first of these fields that has text")
    roles: dict[str, tuple[str, ...]] = setting(
        factory=dict,
        help="CLIP stage: further roles, each with its fields like `short` and `long` (`raw: [raw_caption]`)",
    )
    probabilities: dict[str, float] = setting(
        factory=dict,
        help="CLIP stage: how often each role (`short`, `long`, those of `roles`) is picked for an image; empty: "
        "equally often. A role without text for an image gives its share to the others. Of several texts of a field "
        "one is drawn, anew in each epoch.",
    )
    per_image: int = setting(
        1, "CLIP stage: captions drawn for an image at a time; several are all its positives"
    )
    translations: dict[str, str] = setting(
        factory=dict, help="language -> caption field, for the cross-lingual tables of the evaluation"
    )

    def __post_init__(self) -> None:
        at_least("data.captions", self, 1, "per_image")
        if taken := sorted({"short", "long"} & set(self.roles)):
            raise ConfigError(f"data.captions.roles: {', '.join(taken)} has a setting of its own")
        chances = self.probabilities
        if unknown := sorted(set(chances) - set(self.all_roles)):
            raise ConfigError(
                f"data.captions.probabilities: expected the roles {', '.join(self.all_roles)}, "
                f"got {', '.join(unknown)}"
            )
        if chances and not (min(chances.values()) >= 0 and sum(chances.values()) > 0):
            raise ConfigError(
                f"data.captions.probabilities: expected shares of at least 0, one of them above, got {chances}"
            )

    @property
    def all_roles(self) -> Mapping[str, tuple[str, ...]]:
        """Fields of every role: `short`, `long`, and the further ones."""
        return {"short": self.short, "long": self.long, **self.roles}

    @property
    def chances(self) -> Mapping[str, float]:
        """Relative probability of every role that may be drawn."""
        chances = self.probabilities or dict.fromkeys(self.all_roles, 1.0)
        return {role: chance for role, chance in chances.items() if chance > 0}


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Where samples come from."""

    train: tuple[str, ...] = setting(
        (), "training sources: shard paths with brace ranges or globs, a folder, .jsonl, .csv or .parquet"
    )
    weights: tuple[float, ...] = setting((), "share of each training source in an epoch; empty: by size")
    val: tuple[str, ...] = setting((), "held-out sources (other images or entities than training)")
    captions: CaptionSettings = setting(factory=CaptionSettings, help="caption fields and their roles")
    workers: int | None = setting(
        None,
        "data-loader processes per rank; 0 reads in a thread of the training process; null: 0 where the CPU trains, "
        "beside a GPU this rank's share of the cores",
    )
    shuffle_shards: int = setting(16, "shards whose samples are mixed in one shuffling window")
    max_bad_share: float = setting(0.05, "stop when more than this share of the samples read cannot be used")
    limit: int | None = setting(None, "use only the first so many samples of each source")

    def __post_init__(self) -> None:
        at_least("data", self, 0, "workers")
