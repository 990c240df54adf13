"""The choice of a kernel's tile: the table, and the search on request with times that are made up."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llm2clip_kernels import _env
from llm2clip_kernels.tuning import Config, Tuner, candidates, choose_config, depth_bucket, tuned

KEY = ("some GPU", "an op", 2, 512)
DEFAULT = choose_config("cuda", 9, 2)


def test_a_tile_is_never_deeper_than_the_inputs() -> None:
    assert [depth_bucket(d) for d in (1, 16, 17, 512, 513, 9000)] == [16, 16, 32, 512, 1024, 4096]
    assert choose_config("cuda", 9, 2, 20) == replace(DEFAULT, block_k=32, num_stages=1)
    assert choose_config("cuda", 9, 2, 130) == DEFAULT
    assert choose_config("cuda", 9, 2, 100).num_stages == 2
    assert choose_config("cuda", 12, 2) == choose_config("hip", 11, 4)


def test_the_fastest_that_runs_wins_and_is_remembered(tmp_path: Path) -> None:
    options = candidates(DEFAULT)
    assert options[0] == DEFAULT and len(options) == len(set(options))
    winner, broken = options[5], options[2]
    seen: list[Config] = []

    def run(config: Config) -> None:
        seen.append(config)
        if config == broken:
            raise RuntimeError("out of shared memory")

    def measure(call: Callable[[], Any]) -> float:
        call()
        return 1.0 if seen[-1] == winner else 2.0

    path = tmp_path / "deep" / "tuning.json"
    assert Tuner(path, measure).best(KEY, run, DEFAULT, options) == winner
    assert seen == options
    # another process, another op
    again = Tuner(path, measure)
    assert again.best(KEY, run, DEFAULT, options) == winner and seen == options
    assert again.best(("some GPU", "another", 2, 512), run, DEFAULT, options[:2]) == options[0]
    assert len(json.loads(path.read_text())) == 2
    assert [p.name for p in path.parent.iterdir()] == ["tuning.json"]


def test_nothing_runs_or_the_file_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "tuning.json"
    path.write_text("[{")

    def fail(config: Config) -> None:
        raise RuntimeError("no")

    def measure(call: Callable[[], Any]) -> float:
        call()
        return 0.0

    tuner = Tuner(path, measure)
    assert tuner.found == {}
    assert tuner.best(KEY, fail, DEFAULT, candidates(DEFAULT)) == DEFAULT


def test_no_search_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_env, "triton_interpreted", lambda: True)

    def fail(config: Config) -> None:
        raise AssertionError("searched")

    assert tuned("an op", torch.zeros(3, 64), fail) == choose_config("interpreter", 0, 4, 64)


def test_where_the_file_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLM2CLIP_TUNING_FILE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert _env.tuning_file() == Path("/somewhere/llm2clip/tuning.json")
    monkeypatch.setenv("LLM2CLIP_TUNING_FILE", "/elsewhere/a.json")
    assert _env.tuning_file() == Path("/elsewhere/a.json")
