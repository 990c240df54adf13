"""Settings of the search page."""

from __future__ import annotations

from dataclasses import dataclass

from llm2clip.errors import ConfigError
from llm2clip.settings.base import at_least, setting
from llm2clip.settings.llm import LLMSettings, StoreDtype


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """`llm2clip search`: a local web page that finds images by captions of any length, and captions by images."""

    model: str = setting(
        "",
        "run or model directory of the CLIP stage, the directory of a demo, `transformers:DIRECTORY` or "
        "`open_clip:NAME@WEIGHTS`",
    )
    images: tuple[str, ...] = setting(
        (), "folders of images, searched with all that is below them, or sources (docs/data-formats.md)"
    )
    captions: tuple[str, ...] = setting(
        (),
        "texts that an image finds: sources, or .txt with one text per line; empty: those that came with the images",
    )
    caption_fields: tuple[str, ...] = setting((), "caption fields that are found; empty: all")
    caption_limit: int = setting(20000, "at most so many different captions, first come; 0: none")
    index: str = setting(
        "", "directory of the index; empty: below `search` beside the model, named after the images"
    )
    store: str = setting("", "embedding store of the captions; empty: the one that the run was trained with")
    llm: LLMSettings = setting(factory=LLMSettings, help="the LLM; without `llm.path` the run tells")
    llm_adapter: str = setting("", "run or adapter directory of the LLM stage")
    dtype: StoreDtype = setting("fp16", "stored precision of the index")
    batch_size: int = setting(32, "images per forward pass while the index is built")
    commit_rows: int = setting(1024, "images between two commits; at most so many are lost by a kill")
    max_bad_share: float = setting(0.5, "stop when more than this share of the images cannot be read")
    build_only: bool = setting(False, "build the index and stop")
    resident_mib: int = setting(
        2048, "features of up to so many MiB are kept in memory; larger ones are read for every search"
    )
    approximate_above: int | None = setting(
        None,
        "from so many images on a FAISS index answers, with its measured recall shown; null: always exact",
    )
    host: str = setting("127.0.0.1", "address to listen on; anything but loopback lets others in")
    port: int = setting(7860, "port to listen on; 0: any that is free")
    allowed_hosts: tuple[str, ...] = setting(
        (), "further names under which the page is reached, for example behind a proxy"
    )
    max_upload_mib: int = setting(20, "largest image that may be dropped on the page")
    queue: int = setting(256, "searches that may wait; more are told to try again")
    device: str = setting("auto", "auto: cuda where there is one, else cpu")
    threads: int = setting(0, "CPU threads; 0 leaves torch's choice")

    def __post_init__(self) -> None:
        at_least("search", self, 0, "caption_limit", "port", "threads", "resident_mib")
        at_least(
            "search", self, 1, "batch_size", "commit_rows", "max_upload_mib", "queue", "approximate_above"
        )
        if self.port > 65535:
            raise ConfigError(f"search.port: expected 0 to 65535, got {self.port}")
        if not 0.0 <= self.max_bad_share <= 1.0:
            raise ConfigError(f"search.max_bad_share: expected a share from 0 to 1, got {self.max_bad_share}")
