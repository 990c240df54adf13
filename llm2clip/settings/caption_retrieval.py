"""Settings of `llm2clip evaluate caption-retrieval`: what text encoders know of captions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llm2clip.errors import ConfigError
from llm2clip.settings.base import at_least, setting
from llm2clip.settings.data import CaptionSettings
from llm2clip.settings.llm import LLMSettings, StoreDtype


@dataclass(frozen=True, kw_only=True)
class CaptionRetrievalSettings:
    """`llm2clip evaluate caption-retrieval`: caption retrieval accuracy (CRA) of text encoders, side by side."""

    sets: dict[str, str] = setting(
        factory=dict,
        help="name in the tables -> captions: a COCO (captions_val2017.json) or Karpathy .json, Multi30k's text files "
        "(`test_2016.{1..5}.{en,de}`, `test_2016_flickr.{en,de}`), or any source of docs/data-formats.md",
    )
    sts: dict[str, str] = setting(
        factory=dict,
        help="name in the tables -> sentence pairs with scores (STS-B): .tsv or .csv, with or without a header",
    )
    split: str = setting("test", "split of a Karpathy .json")
    captions: CaptionSettings = setting(
        factory=CaptionSettings,
        help="sources: fields of an image's captions, `short` before `long`, and its translations",
    )
    original: str = setting(
        "", "language that the others are translations of, for Multi30k's files; empty: the first named"
    )
    limit: int | None = setting(None, "use only the first so many images of each set, for a quick look")
    max_bad_share: float = setting(
        0.05, "stop when more than this share of a source's samples cannot be read"
    )
    shared: Literal["wrong", "right"] = setting(
        "wrong",
        "how another image's caption counts that has the very text of the right one: `wrong`, as in the paper, so that "
        "such a tie is broken at random, in expectation; `right`, as in `llm2clip evaluate`",
    )
    llm: LLMSettings = setting(
        factory=LLMSettings,
        help="LLM of the rows `base, causal` and `base, bidirectional` (nothing merged into it, no adapter), of "
        "`merged` where llm.merge names adapters, and of `adapted` where llm.adapter names one",
    )
    base: bool = setting(True, "measure the base LLM, causal and bidirectional")
    encoders: dict[str, str] = setting(
        factory=dict,
        help="name in the tables -> another encoder: a peft directory or run directory of the LLM stage (an adapter of "
        "llm.path), a merged export, an LLM directory, a sentence-transformers directory, an embedding store, "
        "`transformers:DIRECTORY` or `open_clip:NAME@FILE` (the text side of a CLIP model)",
    )
    baseline: str = setting("", "encoder that the others are compared with; empty: the first in the tables")
    dims: tuple[int, ...] = setting(
        (), "also measure the first so many values of every embedding (Matryoshka)"
    )
    dtypes: tuple[StoreDtype, ...] = setting(
        (), "also measure embeddings as a store of this precision returns them"
    )
    out: str = setting("", "directory of results.json, tables.md, tables.tex and report.html")
    captions_out: str = setting(
        "", "write every caption to this .jsonl, for `llm2clip embed data.val=FILE`, and stop"
    )
    token_budget: int = setting(
        0, "tokens per forward pass, padding included; 0: 1024 on a CPU, 8192 elsewhere"
    )
    device: str = setting("auto", "auto: cuda where there is one, else cpu")
    threads: int = setting(0, "CPU threads; 0 leaves torch's choice")
    resamples: int = setting(1000, "bootstrap samples behind the 95 % intervals")
    samples: int = setting(6, "queries that the report shows with their answers")
    seed: int = setting(0, "seed of the bootstrap and of the queries shown")

    def __post_init__(self) -> None:
        at_least("caption-retrieval", self, 2, "limit")
        at_least("caption-retrieval", self, 1, "resamples")
        at_least("caption-retrieval", self, 0, "token_budget", "samples", "max_bad_share")
        if any(dim < 1 for dim in self.dims):
            raise ConfigError(f"dims: expected numbers of at least 1, got {list(self.dims)}")
        if taken := {"base, causal", "base, bidirectional", "merged", "adapted", "chance"} & set(
            self.encoders
        ):
            raise ConfigError(
                f"encoders: the names {', '.join(sorted(taken))} stand for other rows of the tables"
            )
