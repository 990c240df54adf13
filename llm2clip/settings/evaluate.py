"""Settings of the evaluation."""

from __future__ import annotations

from dataclasses import dataclass

from llm2clip.settings.base import setting
from llm2clip.settings.data import DataSettings
from llm2clip.settings.llm import LLMSettings


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
